/* STAND-IN for nccl-tests' programs, for nodes without a GPU: the real ones' options, table and ways to fail.
 *
 * The times are real: those of MPI's collectives over the network that there is, or of copies in memory where one
 * process has several "GPUs" (-g, -t; together with several processes only the real ones can that). The results are
 * compared, too. What NCCL would say of the network (NCCL_DEBUG) is claimed by the file /etc/stand-in/nccl-tests, or
 * the one that NCCL_TESTS_STAND_IN names. Its lines are KEY VALUE; KEY.RANK is for one rank only:
 *
 *   net        Socket (default), IB, or a plugin's name
 *   nics       with their ports and links: mlx5_0:1/RoCE mlx5_1:1/RoCE (default mlx5_0:1/IB)
 *   gdr, nvls, collnet, p2p      1: there is GPUDirect RDMA, NVLink SHARP, a switch with SHARP, NVLink (default 0)
 *   warn       the text of one NCCL WARN
 *   memory_mib of a GPU; the largest size is a third (default 192)
 *   devices    number of GPUs of the host (default 64); bus: bus number of the first (default 27, 1b)
 *   wrong      number of elements that are damaged in each result
 *   delay_us   microseconds that each operation waits
 *   fail       no-driver, not-initialized, out-of-memory (before the table); network, hang, crash, torn (half-way)
 */
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include "nccl.h"
#include "stand_in.h"

#define TESTS "2.19.6+STAND-IN"

static const struct collective collectives[] = {
    {"all_reduce_perf", "AllReduce", 1, 0, 0}, {"all_gather_perf", "AllGather", 0, 0, 1},
    {"reduce_scatter_perf", "ReduceScatter", 1, 0, 1}, {"alltoall_perf", "AlltoAll", 0, 0, 1},
    {"alltoallv_perf", "AlltoAllv", 0, 0, 1},
    {"broadcast_perf", "Broadcast", 0, 1, 0}, {"reduce_perf", "Reduce", 1, 1, 0}, {"sendrecv_perf", "SendRecv", 0, 0, 0},
    {"gather_perf", "Gather", 0, 1, 1}, {"scatter_perf", "Scatter", 0, 1, 1}, {"hypercube_perf", "HyperCube", 0, 0, 1},
};
static const char *const operations[] = {"sum", "prod", "max", "min"};
const struct collective *test;

static int threads = 1, gpus = 1, iterations = 20, warmups = 1, together = 1, check = 1, root, average = 1, cycles = 1, graph,
           unalign, op, type_number = 7;
static size_t smallest = 32 << 20, largest = 32 << 20, step = 1 << 20, factor = 1;
static int errors, rows;
static double sum_of_busbw;

/* Ends as the real ones do: each function on the way prints its line; MPI is left as it is. */
static void fail(const char *line, int status)
{
    printf("%s: Test %s\n .. %s pid %d: Test failure common.cu:1454\n", hostname, line, hostname, getpid());
    fflush(stdout);
    _exit(status);
}

static double parse_size(const char *text)
{
    double size;
    char unit[2] = "";
    if (sscanf(text, "%lf %1s", &size, unit) < 1)
        return -1;
    return size * (strchr("gG", *unit) && *unit ? 1 << 30 : strchr("mM", *unit) && *unit ? 1 << 20
                   : strchr("kK", *unit) && *unit ? 1 << 10 : *unit ? -1 : 1);
}

static size_t size_option(const char *text, const char *name)
{
    double size = parse_size(text);
    if (size < 0) {
        fprintf(stderr, "invalid size specified for '%s'\n", name);
        exit(255);
    }
    return (size_t)size;
}

static int number_of(const char *name, const char *const *names, int count)
{
    for (int i = 0; i < count; i++)
        if (!strcasecmp(name, names[i]))
            return i;
    return strcasecmp(name, "all") ? 0 : -1;
}

static void parse_options(int argc, char **argv)
{
    static const struct option options[] = {
        {"nthreads", 1, 0, 't'}, {"ngpus", 1, 0, 'g'}, {"minbytes", 1, 0, 'b'}, {"maxbytes", 1, 0, 'e'},
        {"stepbytes", 1, 0, 'i'}, {"stepfactor", 1, 0, 'f'}, {"iters", 1, 0, 'n'}, {"agg_iters", 1, 0, 'm'},
        {"warmup_iters", 1, 0, 'w'}, {"run_cycles", 1, 0, 'N'}, {"parallel_init", 1, 0, 'p'}, {"check", 1, 0, 'c'},
        {"op", 1, 0, 'o'}, {"datatype", 1, 0, 'd'}, {"root", 1, 0, 'r'}, {"blocking", 1, 0, 'z'},
        {"stream_null", 1, 0, 'y'}, {"timeout", 1, 0, 'T'}, {"cudagraph", 1, 0, 'G'}, {"average", 1, 0, 'a'},
        {"local_register", 1, 0, 'R'}, {"cta_policy", 1, 0, 'x'}, {"unalign", 1, 0, 'u'}, {"help", 0, 0, 'h'}, {0},
    };
    const char *names[16];
    for (int i = 0; i < type_count; i++)
        names[i] = types[i].name;
    for (int c; (c = getopt_long(argc, argv, "t:g:b:e:i:f:n:m:w:N:p:c:o:d:r:z:y:T:G:a:R:x:u:h", options, NULL)) != -1;) {
        switch (c) {
        case 't': threads = atoi(optarg); break;
        case 'g': gpus = atoi(optarg); break;
        case 'b': smallest = size_option(optarg, "minbytes"); break;
        case 'e': largest = size_option(optarg, "maxbytes"); break;
        case 'i': step = size_option(optarg, "stepBytes"); break;
        case 'f': factor = strtoul(optarg, NULL, 0); break;
        case 'n': iterations = atoi(optarg); break;
        case 'm': together = atoi(optarg); break;
        case 'w': warmups = atoi(optarg); break;
        case 'N': cycles = atoi(optarg); break;
        case 'c': check = atoi(optarg); break;
        case 'o': op = number_of(optarg, operations, 4); break;
        case 'd': type_number = number_of(optarg, names, type_count); break;
        case 'r': root = atoi(optarg); break;
        case 'a': average = atoi(optarg); break;
        case 'G': graph = atoi(optarg); break;
        case 'u': unalign = atoi(optarg); break;
        case 'p': case 'z': case 'y': case 'T': case 'R': case 'x': break; /* nothing to do on a CPU */
        default:
            if (c != 'h')
                printf("invalid option '%c'\n", c);
            printf("USAGE: %s \n\tSTAND-IN: see perf.c and the real one's --help\n", test->program);
            exit(0);
        }
    }
    if (smallest > largest) {
        fprintf(stderr, "invalid sizes for 'minbytes' and 'maxbytes': %zu > %zu\n", smallest, largest);
        exit(255);
    }
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

/* --- the report --- */

static void print_header(void)
{
    int version, main_rank = !ranks.world_rank, number = threads * gpus;
    char lines[2048] = "";
    ncclGetVersion(&version);
    if (main_rank) {
        printf("# nccl-tests version %s nccl-headers=%d nccl-library=%d\n", TESTS, NCCL_VERSION_CODE, version);
        printf("# Collective test starting: %s\n", test->program);
        printf("# nThread %d nGpus %d minBytes %ld maxBytes %ld step: %ld(%s) warmup iters: %d iters: %d agg iters: %d "
               "validation: %d graph: %d unalign: %d\n#\n# Using devices\n", threads, gpus, (long)smallest, (long)largest,
               (long)(factor > 1 ? factor : step), factor > 1 ? "factor" : "bytes", warmups, iterations, together, check, graph,
               unalign);
    }
    const char *failure = planted("fail", "");
    if (!strcmp(failure, "no-driver"))
        fail("CUDA failure util.cu:674 'CUDA driver version is insufficient for CUDA runtime version'", 2);
    if (!strcmp(failure, "not-initialized"))
        fail("CUDA failure util.cu:674 'system not yet initialized'", 2);
    int available = atoi(planted("devices", "64"));
    if (ranks.on_host * number + number > available) {
        fprintf(stderr, "Invalid number of GPUs: %d requested but only %d were found.\n"
                "Please check the number of processes and GPUs per process.\n", ranks.on_host * number + number, available);
        printf(" .. %s pid %d: Test failure common.cu:1454\n", hostname, getpid());
        fflush(stdout);
        _exit(5);
    }
    first_bus = atoi(planted("bus", "27"));
    for (int i = 0; i < number; i++) {
        int device = ranks.on_host * number + i;
        snprintf(lines + strlen(lines), sizeof lines - strlen(lines), "#  Rank %2d Group %2d Pid %6d on %10s device %2d "
                 "[%04x:%02x:%02x] STAND-IN\n", ranks.world_rank * number + i, ranks.color, getpid(), hostname, device, 0,
                 first_bus + device, 0);
    }
    print_in_order(lines);
    size_t most = ((size_t)atol(planted("memory_mib", "192")) << 20) / (check ? 3 : 2);
    if (largest > most) {
        largest = most;
        smallest = smallest > largest ? largest : smallest;
        if (main_rank)
            printf("#\n# Reducing maxBytes to %ld due to memory limitation\n", (long)largest);
    }
    start_log(ranks.on_host * number);
    if (!strcmp(failure, "out-of-memory")) {
        log_warning("misc/cudawrap.cc:37", "Cuda failure 2 'out of memory'");
        fail("NCCL failure common.cu:1059 'unhandled cuda error (run with NCCL_DEBUG=INFO for details) / Cuda failure 2 'out of "
             "memory''", 3);
    }
    log_communicator();
    if (main_rank) {
        printf("#\n# %10s  %12s  %8s  %6s  %6s           out-of-place                       in-place          \n", "", "", "", "", "");
        printf("# %10s  %12s  %8s  %6s  %6s  %7s  %6s  %6s  %6s  %7s  %6s  %6s  %6s %*s\n", "size", "count", "type", "redop",
               "root", "time", "algbw", "busbw", "#wrong", "time", "algbw", "busbw", "#wrong", 0, "");
        printf("# %10s  %12s  %8s  %6s  %6s  %7s  %6s  %6s  %6s  %7s  %6s  %6s  %6s %*s\n", "(B)", "(elements)", "", "", "",
               "(us)", "(GB/s)", "(GB/s)", "", "(us)", "(GB/s)", "(GB/s)", "", 0, "");
    }
}

/* As wide as the column: with two decimals, one, none, or as a power. */
static const char *column(char *text, double value, int width)
{
    for (int decimals = 2; decimals >= 0; decimals--)
        if (snprintf(text, 64, "%*.*f", width, decimals, value) <= width)
            return text;
    snprintf(text, 64, width >= 7 ? "%*.1e" : "%*.0e", width, value);
    return text;
}

static void print_result(double us, double algbw, double busbw, int checked, long wrong)
{
    char a[64], b[64], c[64];
    if (ranks.world_rank)
        return;
    printf("  %7s  %6s  %6s", column(a, us, 7), column(b, algbw, 6), column(c, busbw, 6));
    if (checked)
        printf("  %6g", (double)wrong);
    else
        printf("    N/A");
}

/* Algorithm and bus bandwidth in GB/s of `count` elements a rank, as nccl-tests define them. */
static void bandwidth(size_t count, size_t size, double s, double *algbw, double *busbw)
{
    const double n = ranks.size;
    const char *name = test->name;
    if (!strcmp(name, "AlltoAllv"))
        *algbw = all_to_all_v(0, ranks.size, count, size) * size / 1e9 / s;
    else
        *algbw = count * size * (test->blocks ? strcmp(name, "HyperCube") ? n : n - 1 : 1) / 1e9 / s;
    *busbw = *algbw * (!strcmp(name, "AllReduce") ? 2 * (n - 1) / n : test->blocks && strcmp(name, "HyperCube") ? (n - 1) / n : 1);
}

/* --- the measurement --- */

static void fail_halfway(void)
{
    const char *failure = planted("fail", "");
    if (!strcmp(failure, "hang"))
        for (;;)
            pause();
    if (!strcmp(failure, "crash"))
        raise(SIGSEGV);
    if (!strcmp(failure, "torn")) { /* what a process leaves that is killed while its buffer is written */
        if (!ranks.world_rank)
            printf("     7.");
        fflush(stdout);
        raise(SIGKILL);
    }
    if (!strcmp(failure, "network")) {
        const char *text = "NET/IB: Got completion from peer 10.0.0.2<47123> with status=IBV_WC_RETRY_EXC_ERR(12) "
                           "opcode=IBV_WC_SEND(0) vendor_err=129 req_type=Send hca mlx5_0";
        char line[512];
        log_warning("transport/net_ib/p2p.cc:688", text);
        snprintf(line, sizeof line, "NCCL failure common.cu:573 'remote process exited or there was a network error / %s'", text);
        fail(line, 3);
    }
}

static void measure(size_t bytes, const struct type *type, int operation, int from, int in_place)
{
    size_t sent, received, count;
    double algbw, busbw, started, took;
    long wrong = 0;
    int unchecked = in_place && (!strcmp(test->name, "SendRecv") || !strcmp(test->name, "AlltoAllv"));
    int checked = check && !unchecked; /* the real ones do not support it */
    byte_counts(bytes, type, &sent, &received, &count);
    fill(bytes, type, in_place);
    run(bytes, type, operation, from, in_place);
    barrier();
    started = seconds();
    for (int i = 0; i < iterations * together; i++) {
        log_operation(count * type->size);
        run(bytes, type, operation, from, in_place);
    }
    took = over_ranks((seconds() - started) / ((double)iterations * together), average);
    bandwidth(count, type->size, took, &algbw, &busbw);
    if (check) {
        barrier();
        fill(bytes, type, in_place);
        barrier();
        run(bytes, type, operation, from, in_place);
        long mine = wrong_values(bytes, type, operation, from, atol(planted("wrong", "0")));
        errors += checked && mine;
        wrong = (long)over_ranks((double)mine, 4);
    }
    print_result(took * 1e6, algbw, busbw, checked, wrong);
    sum_of_busbw += busbw;
    rows++;
}

static void run_table(const struct type *type, int operation, int from)
{
    int number = 0, half = 0;
    size_t sent, received, count;
    for (size_t bytes = smallest; bytes <= largest; bytes *= 2)
        for (int i = 0; i < warmups; i++) {
            fill(bytes, type, 0);
            run(bytes, type, operation, from, 0);
        }
    for (size_t bytes = smallest; bytes <= largest; bytes = factor > 1 ? bytes * factor : bytes + step)
        half++;
    for (int cycle = 0; cycle < cycles; cycle++)
        for (size_t bytes = smallest; bytes <= largest; bytes = factor > 1 ? bytes * factor : bytes + step) {
            byte_counts(bytes, type, &sent, &received, &count);
            if (!ranks.world_rank)
                printf("%12li  %12li  %8s  %6s  %6i", (long)(sent > received ? sent : received), (long)count, type->name,
                       test->reduces ? operations[operation] : strcmp(test->name, "HyperCube") ? strcmp(test->name, "SendRecv")
                       ? "none" : operations[operation] : "", test->rooted ? from : -1);
            if (number++ == half / 2)
                fail_halfway();
            measure(bytes, type, operation, from, 0);
            measure(bytes, type, operation, from, 1);
            if (!ranks.world_rank)
                printf("\n");
        }
}

int main(int argc, char **argv)
{
    const char *program = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    setlinebuf(stdout);
    for (size_t i = 0; i < sizeof collectives / sizeof *collectives; i++)
        if (!strcmp(program, collectives[i].program))
            test = &collectives[i];
    if (!test) {
        fprintf(stderr, "%s: not a name of nccl-tests\n", program);
        return 255;
    }
    gethostname(hostname, sizeof hostname - 1);
    hostname[strcspn(hostname, ".")] = 0;
    parse_options(argc, argv);
    start_ranks(&argc, &argv);
    split_ranks();
    ranks.gpus = threads * gpus;
    if (ranks.gpus > 1 && ranks.world_size > 1) {
        fprintf(stderr, "STAND-IN: several GPUs of each of several processes: start one process a GPU with -g 1\n");
        return 6;
    }
    if (ranks.gpus > 1) {
        ranks.size = ranks.gpus;
        ranks.host_of = calloc(ranks.size, sizeof *ranks.host_of);
    }
    print_header();
    allocate(largest);
    if (!strcmp(test->name, "HyperCube") && ranks.size & (ranks.size - 1))
        printf("nRanks %d is not a power of 2, skipping\n", ranks.size);
    else
        for (int t = type_number < 0 ? 0 : type_number; t < (type_number < 0 ? type_count : type_number + 1); t++)
            for (int o = op < 0 ? 0 : op; o < (op < 0 && test->reduces ? 4 : (op < 0 ? 0 : op) + 1); o++)
                for (int r = root < 0 ? 0 : root; r < (root < 0 && test->rooted ? ranks.size : (root < 0 ? 0 : root) + 1); r++)
                    run_table(&types[t], o, r);
    errors = (int)over_ranks(errors, 4);
    if (!ranks.world_rank) {
        printf("# %-20s : %d %s\n", "Out of bounds values", errors, errors ? "FAILED" : "OK");
        printf("# %-20s : %g %s\n#\n", "Avg bus bandwidth", sum_of_busbw / rows, "");
        printf("# Collective test concluded: %s\n#\n", test->program);
    }
    end_ranks();
    if (!ranks.world_rank)
        printf("\n");
    if (errors) {
        printf(" .. %s pid %d: Test failure common.cu:1454\n", hostname, getpid());
        return 7;
    }
    return 0;
}
