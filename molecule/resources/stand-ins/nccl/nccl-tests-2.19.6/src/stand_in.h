/* STAND-IN for nccl-tests: what its three files share. See perf.c for what it is. */
#include <stddef.h>

struct type {
    const char *name;
    size_t size;
    int kind; /* see KINDS in collectives.c: how its numbers are added */
};

struct collective {
    const char *program, *name; /* "all_reduce_perf", "AllReduce" */
    int reduces, rooted, blocks; /* blocks: the size is what all ranks have together */
};

enum { SUM, PROD, MAX, MIN };

/* The ranks: of the world (all processes), and of this one's group (NCCL_TESTS_SPLIT). */
struct ranks {
    int world_rank, world_size, on_host; /* on_host: which of this host's processes this is */
    int color, rank, size;               /* in the group; the size counts the GPUs of each process too */
    int *host_of;                        /* of each process of the group: the first one of the group on its host */
    int gpus;                            /* of each process */
};

extern struct ranks ranks;
extern const struct type types[];
extern const int type_count;
extern const struct collective *test;

/* collectives.c */
void start_ranks(int *argc, char ***argv);
void split_ranks(void);
void end_ranks(void);
void barrier(void);
double over_ranks(double value, int average); /* of the world: 0 rank 0's, 1 mean, 2 min, 3 max, 4 sum */
void print_in_order(const char *line);
size_t all_to_all_v(int from, int to, size_t count, size_t size); /* what a rank sends to those before `to` */
void byte_counts(size_t bytes, const struct type *type, size_t *sent, size_t *received, size_t *count);
void allocate(size_t bytes);
void fill(size_t bytes, const struct type *type, int in_place);
void run(size_t bytes, const struct type *type, int op, int root, int in_place);
long wrong_values(size_t bytes, const struct type *type, int op, int root, long planted);

/* nccl_log.c */
const char *planted(const char *key, const char *otherwise);
void start_log(int device);
void log_communicator(void);
void log_operation(size_t bytes);
void log_warning(const char *where, const char *text);
extern char hostname[1024];
extern unsigned first_bus;
