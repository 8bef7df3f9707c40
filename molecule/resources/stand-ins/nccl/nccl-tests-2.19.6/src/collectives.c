/* STAND-IN for NCCL's collectives: MPI's, between processes; with several "GPUs" of one process, copies in its memory.
 *
 * Every element of a rank's input is 1 or 2, by its rank and index; so every result is known, and is compared.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef MPI_SUPPORT
#include <mpi.h>
#endif

#include "stand_in.h"

/* 16-bit floating point and FP8 are added as integers: as many bytes move, and the CPU has no arithmetic for them. */
#define KINDS(X) X(0, int8_t, MPI_INT8_T) X(1, uint8_t, MPI_UINT8_T) X(2, int32_t, MPI_INT32_T) \
    X(3, uint32_t, MPI_UINT32_T) X(4, int64_t, MPI_INT64_T) X(5, uint64_t, MPI_UINT64_T) X(6, float, MPI_FLOAT) \
    X(7, double, MPI_DOUBLE) X(8, uint16_t, MPI_UINT16_T)

const struct type types[] = {
    {"int8", 1, 0}, {"uint8", 1, 1}, {"int32", 4, 2}, {"uint32", 4, 3}, {"int64", 8, 4}, {"uint64", 8, 5},
    {"half", 2, 8}, {"float", 4, 6}, {"double", 8, 7}, {"bfloat16", 2, 8}, {"f8e4m3", 1, 1}, {"f8e5m2", 1, 1},
};
const int type_count = sizeof types / sizeof *types;
struct ranks ranks = {.world_size = 1, .size = 1, .gpus = 1};
static char **sends, **receives; /* of each GPU of this process */

/* How many elements of AlltoAllv a rank sends to another: the more, the farther it is, in whole 16 bytes. */
static size_t share(int from, int to, size_t count, size_t size)
{
    size_t n = ranks.size, distance = (to - from + n) % n, whole = count * n * size;
    size_t bytes = n == 1 ? whole : (size_t)((double)distance * whole / (n * (n - 1) / 2));
    return (bytes & ~(size_t)15) / size;
}

size_t all_to_all_v(int from, int to, size_t count, size_t size)
{
    size_t sum = 0;
    for (int other = 0; other < to; other++)
        sum += share(from, other, count, size);
    return sum;
}

#ifdef MPI_SUPPORT
static MPI_Comm group = MPI_COMM_NULL;

static MPI_Datatype mpi_type(const struct type *type)
{
#define X(number, c, mpi) if (type->kind == number) return mpi;
    KINDS(X)
#undef X
    return MPI_BYTE;
}

static MPI_Op mpi_op(int op)
{
    return op == PROD ? MPI_PROD : op == MAX ? MPI_MAX : op == MIN ? MPI_MIN : MPI_SUM;
}

void start_ranks(int *argc, char ***argv)
{
    MPI_Init(argc, argv);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks.world_size);
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks.world_rank);
}

/* "AND 0x1", "&1", "OR 1", "MOD 8", "%8", "DIV 8", "/8": the group of a rank, as nccl-tests reads it. */
static int color_of(int rank)
{
    static const char *const words[] = {"AND", "&", "OR", "|", "MOD", "%", "DIV", "/"};
    const char *split = getenv("NCCL_TESTS_SPLIT"), *mask = getenv("NCCL_TESTS_SPLIT_MASK");
    if (mask)
        return rank & (int)strtoul(mask, NULL, 16);
    for (int i = 0; split && i < 8; i++)
        if (!strncasecmp(split, words[i], strlen(words[i]))) {
            const char *number = split + strlen(words[i]);
            while (*number == ' ')
                number++;
            int by = strncasecmp(number, "0b", 2) ? (int)strtoul(number, NULL, 0) : (int)strtoul(number + 2, NULL, 2);
            if (i < 2)
                return rank & by;
            if (i < 4)
                return rank | by;
            if (by)
                return i < 6 ? rank % by : rank / by;
        }
    return 0;
}

void split_ranks(void)
{
    char (*names)[64] = calloc(ranks.world_size, sizeof *names);
    snprintf(names[ranks.world_rank], sizeof *names, "%.63s", hostname);
    MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, names, sizeof *names, MPI_BYTE, MPI_COMM_WORLD);
    for (int other = 0; other < ranks.world_rank; other++)
        ranks.on_host += !strcmp(names[other], names[ranks.world_rank]);
    ranks.color = color_of(ranks.world_rank);
    MPI_Comm_split(MPI_COMM_WORLD, ranks.color, ranks.world_rank, &group);
    MPI_Comm_size(group, &ranks.size);
    MPI_Comm_rank(group, &ranks.rank);
    int *world = calloc(ranks.size, sizeof *world);
    MPI_Allgather(&ranks.world_rank, 1, MPI_INT, world, 1, MPI_INT, group);
    ranks.host_of = calloc(ranks.size, sizeof *ranks.host_of);
    for (int each = 0; each < ranks.size; each++)
        while (strcmp(names[world[ranks.host_of[each]]], names[world[each]]))
            ranks.host_of[each]++;
    free(world);
    free(names);
}

void end_ranks(void)
{
    MPI_Comm_free(&group);
    MPI_Finalize();
}

void barrier(void)
{
    MPI_Barrier(MPI_COMM_WORLD);
}

double over_ranks(double value, int average)
{
    MPI_Op op = average == 2 ? MPI_MIN : average == 3 ? MPI_MAX : MPI_SUM;
    if (average)
        MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_DOUBLE, op, MPI_COMM_WORLD);
    return average == 1 ? value / ranks.world_size : value;
}

void print_in_order(const char *line)
{
    enum { LENGTH = 2048 };
    char mine[LENGTH] = "", *lines = ranks.world_rank ? NULL : malloc((size_t)LENGTH * ranks.world_size);
    strncpy(mine, line, LENGTH - 1);
    MPI_Gather(mine, LENGTH, MPI_BYTE, lines, LENGTH, MPI_BYTE, 0, MPI_COMM_WORLD);
    for (int rank = 0; lines && rank < ranks.world_size; rank++)
        printf("%s", lines + LENGTH * rank);
    free(lines);
}

static void hypercube(char *blocks, size_t block)
{
    for (int mask = 1; mask < ranks.size; mask <<= 1) {
        int mine = ranks.rank & ~(mask - 1), theirs = mine ^ mask, peer = ranks.rank ^ mask, bytes = (int)(block * mask);
        MPI_Sendrecv(blocks + mine * block, bytes, MPI_BYTE, peer, 0, blocks + theirs * block, bytes, MPI_BYTE, peer, 0,
                     group, MPI_STATUS_IGNORE);
    }
}

static void run_mpi(size_t count, const struct type *type, int op, int root, int in_place)
{
    MPI_Datatype mpi = mpi_type(type);
    const int n = (int)count, leads = ranks.rank == root;
    char *send = sends[0], *receive = receives[0], *block = receive + ranks.rank * count * type->size;
    void *from = in_place ? MPI_IN_PLACE : send;
    const char *name = test->name;
    if (!strcmp(name, "AllReduce"))
        MPI_Allreduce(from, receive, n, mpi, mpi_op(op), group);
    else if (!strcmp(name, "AllGather"))
        MPI_Allgather(from, n, mpi, receive, n, mpi, group);
    else if (!strcmp(name, "ReduceScatter"))
        MPI_Reduce_scatter_block(from, receive, n, mpi, mpi_op(op), group);
    else if (!strcmp(name, "AlltoAll"))
        MPI_Alltoall(from, n, mpi, receive, n, mpi, group);
    else if (!strcmp(name, "AlltoAllv")) {
        int *each = calloc(4 * ranks.size, sizeof *each), *counts[2], *places[2];
        size_t sum = 0;
        for (int way = 0; way < 2; way++)
            counts[way] = each + 2 * way * ranks.size, places[way] = counts[way] + ranks.size;
        for (int other = 0; other < ranks.size; other++) {
            counts[0][other] = (int)share(ranks.rank, other, count, type->size);
            places[0][other] = (int)all_to_all_v(ranks.rank, other, count, type->size);
            counts[1][other] = (int)share(other, ranks.rank, count, type->size);
            places[1][other] = (int)sum;
            sum += counts[1][other];
        }
        if (in_place)
            memcpy(send, receive, all_to_all_v(ranks.rank, ranks.size, count, type->size) * type->size);
        MPI_Alltoallv(send, counts[0], places[0], mpi, receive, counts[1], places[1], mpi, group);
        free(each);
    }
    else if (!strcmp(name, "Broadcast")) {
        if (leads && !in_place)
            memcpy(receive, send, count * type->size);
        MPI_Bcast(receive, n, mpi, root, group);
    } else if (!strcmp(name, "Reduce"))
        MPI_Reduce(leads ? from : in_place ? receive : send, receive, n, mpi, mpi_op(op), root, group);
    else if (!strcmp(name, "Gather"))
        MPI_Gather(leads ? from : in_place ? block : send, n, mpi, receive, n, mpi, root, group);
    else if (!strcmp(name, "Scatter")) {
        MPI_Scatter(in_place ? receive : send, n, mpi, leads && in_place ? MPI_IN_PLACE : receive, n, mpi, root, group);
        if (leads && in_place)
            memmove(receive, block, count * type->size);
    } else if (!strcmp(name, "SendRecv")) {
        int to = (ranks.rank + 1) % ranks.size, source = (ranks.rank + ranks.size - 1) % ranks.size;
        if (in_place)
            MPI_Sendrecv_replace(receive, n, mpi, to, 0, source, 0, group, MPI_STATUS_IGNORE);
        else
            MPI_Sendrecv(send, n, mpi, to, 0, receive, n, mpi, source, 0, group, MPI_STATUS_IGNORE);
    } else {
        if (!in_place)
            memcpy(block, send, count * type->size);
        hypercube(receive, count * type->size);
    }
}
#else
void start_ranks(int *argc, char ***argv)
{
}

void split_ranks(void)
{
    ranks.host_of = calloc(1, sizeof *ranks.host_of);
}

void end_ranks(void)
{
}

void barrier(void)
{
}

double over_ranks(double value, int average)
{
    return value;
}

void print_in_order(const char *line)
{
    printf("%s", line);
}

static void run_mpi(size_t count, const struct type *type, int op, int root, int in_place)
{
}
#endif

/* --- several GPUs in one process --- */

static void fold(char *into, const char *from, size_t count, const struct type *type, int op)
{
#define X(number, c, mpi)                                                                                   \
    if (type->kind == number) {                                                                             \
        c *a = (c *)into;                                                                                   \
        const c *b = (const c *)from;                                                                       \
        for (size_t i = 0; i < count; i++)                                                                  \
            a[i] = op == PROD ? a[i] * b[i] : op == MAX ? (a[i] > b[i] ? a[i] : b[i])                       \
                 : op == MIN ? (a[i] < b[i] ? a[i] : b[i]) : a[i] + b[i];                                   \
    }
    KINDS(X)
#undef X
}

/* sends[] has every GPU's input here, in place or not: run() has copied it. */
static void run_here(size_t count, const struct type *type, int op, int root)
{
    const size_t bytes = count * type->size;
    const int gpus = ranks.gpus;
    const char *name = test->name;
    if (test->reduces) {
        size_t whole = test->blocks ? bytes * gpus : bytes;
        char *sum = malloc(whole ? whole : 1);
        memcpy(sum, sends[0], whole);
        for (int gpu = 1; gpu < gpus; gpu++)
            fold(sum, sends[gpu], whole / type->size, type, op);
        for (int gpu = 0; gpu < gpus; gpu++)
            if (!test->rooted || gpu == root)
                memcpy(receives[gpu], sum + (test->blocks ? gpu * bytes : 0), bytes);
        free(sum);
        return;
    }
    for (int gpu = 0; gpu < gpus; gpu++) {
        if (!strcmp(name, "Broadcast"))
            memcpy(receives[gpu], sends[root], bytes);
        else if (!strcmp(name, "Scatter"))
            memcpy(receives[gpu], sends[root] + gpu * bytes, bytes);
        else if (!strcmp(name, "SendRecv"))
            memcpy(receives[gpu], sends[(gpu + gpus - 1) % gpus], bytes);
        else if (!strcmp(name, "AlltoAll"))
            for (int other = 0; other < gpus; other++)
                memcpy(receives[gpu] + other * bytes, sends[other] + gpu * bytes, bytes);
        else if (!strcmp(name, "AlltoAllv")) {
            char *into = receives[gpu];
            for (int other = 0; other < gpus; other++) {
                size_t part = share(other, gpu, count, type->size) * type->size;
                memcpy(into, sends[other] + all_to_all_v(other, gpu, count, type->size) * type->size, part);
                into += part;
            }
        } else if (!test->rooted || gpu == root)
            for (int other = 0; other < gpus; other++)
                memcpy(receives[gpu] + other * bytes, sends[other], bytes);
    }
}

/* --- inputs, runs, results --- */

void byte_counts(size_t bytes, const struct type *type, size_t *sent, size_t *received, size_t *count)
{
    size_t elements = bytes / type->size;
    *count = test->blocks ? elements / ranks.size & ~(16 / type->size - 1) : elements;
    size_t one = *count * type->size, all = one * ranks.size;
    const char *name = test->name;
    int gathers = !strcmp(name, "AllGather") || !strcmp(name, "Gather") || !strcmp(name, "HyperCube");
    int scatters = !strcmp(name, "ReduceScatter") || !strcmp(name, "Scatter");
    *sent = scatters || !strcmp(name, "AlltoAll") ? all : one;
    *received = gathers || !strcmp(name, "AlltoAll") ? all : one;
    if (!strcmp(name, "AlltoAllv"))
        *sent = *received = all_to_all_v(0, ranks.size, *count, type->size) * type->size;
}

void allocate(size_t bytes)
{
    sends = calloc(ranks.gpus, sizeof *sends);
    receives = calloc(ranks.gpus, sizeof *receives);
    for (int gpu = 0; gpu < ranks.gpus; gpu++) {
        sends[gpu] = malloc(bytes + 64);
        receives[gpu] = malloc(bytes + 64);
    }
}

static int value(int rank, size_t index)
{
    return (rank + index) % 4 ? 1 : 2;
}

/* The number as the type has it; a 16-bit float is an integer here. */
static void put(char *at, const struct type *type, double number)
{
#define X(number_of_kind, c, mpi) if (type->kind == number_of_kind) { c it = (c)number; memcpy(at, &it, sizeof it); }
    KINDS(X)
#undef X
}

static void write_input(char *into, size_t bytes, const struct type *type, int rank)
{
    char words[4][8];
    for (int i = 0; i < 4; i++)
        put(words[i], type, value(rank, i));
    for (size_t i = 0; i < bytes / type->size; i++)
        memcpy(into + i * type->size, words[i % 4], type->size);
}

void fill(size_t bytes, const struct type *type, int in_place)
{
    size_t sent, received, count;
    byte_counts(bytes, type, &sent, &received, &count);
    for (int gpu = 0; gpu < ranks.gpus; gpu++) {
        int rank = ranks.rank + gpu, own = in_place && sent < received; /* its own block of what it gathers */
        memset(receives[gpu], 0, received > sent ? received : sent);
        write_input(in_place ? receives[gpu] + (own ? rank * sent : 0) : sends[gpu], sent, type, rank);
    }
}

void run(size_t bytes, const struct type *type, int op, int root, int in_place)
{
    size_t sent, received, count;
    byte_counts(bytes, type, &sent, &received, &count);
    long delay_us = atol(planted("delay_us", "0"));
    if (delay_us)
        usleep(delay_us);
    if (ranks.gpus == 1 && ranks.world_size > 1) {
        run_mpi(count, type, op, root, in_place);
        return;
    }
    for (int gpu = 0; in_place && gpu < ranks.gpus; gpu++)
        memcpy(sends[gpu], receives[gpu] + (sent < received ? gpu * sent : 0), sent);
    run_here(count, type, op, root);
}

/* What every element of this phase (its index modulo 4) of a reduction must be. */
static double reduced(int phase, int op)
{
    double all = value(0, phase);
    for (int rank = 1; rank < ranks.size; rank++) {
        double one = value(rank, phase);
        all = op == PROD ? all * one : op == MAX ? (all > one ? all : one) : op == MIN ? (all < one ? all : one) : all + one;
    }
    return all;
}

/* What a rank must have received at an index of what is not a reduction. */
static double moved(size_t index, size_t count, size_t size, int rank, int root)
{
    const char *name = test->name;
    if (!strcmp(name, "AlltoAllv")) {
        int source = 0;
        for (; index >= share(source, rank, count, size); source++)
            index -= share(source, rank, count, size);
        return value(source, all_to_all_v(source, rank, count, size) + index);
    }
    if (!strcmp(name, "Broadcast"))
        return value(root, index);
    if (!strcmp(name, "Scatter"))
        return value(root, rank * count + index);
    if (!strcmp(name, "SendRecv"))
        return value((rank + ranks.size - 1) % ranks.size, index);
    return value((int)(index / count), strcmp(name, "AlltoAll") ? index % count : rank * count + index % count);
}

/* The number of wrong elements that this process received; the first `planted` of each GPU are damaged beforehand. */
long wrong_values(size_t bytes, const struct type *type, int op, int root, long planted)
{
    size_t sent, received, count;
    long wrong = 0;
    double sums[4];
    for (int phase = 0; phase < 4; phase++)
        sums[phase] = reduced(phase, op);
    byte_counts(bytes, type, &sent, &received, &count);
    for (int gpu = 0; gpu < ranks.gpus; gpu++) {
        int rank = ranks.rank + gpu;
        if (test->rooted && rank != root && (test->reduces || !strcmp(test->name, "Gather")))
            continue; /* only the root receives */
        for (size_t i = 0; i < received / type->size; i++) {
            char right[8], *found = receives[gpu] + i * type->size;
            size_t phase = (i + (test->blocks ? rank * count : 0)) % 4;
            if ((long)i < planted)
                *found ^= 1;
            put(right, type, test->reduces ? sums[phase] : moved(i, count, type->size, rank, root));
            wrong += memcmp(right, found, type->size) != 0;
        }
    }
    return wrong;
}
