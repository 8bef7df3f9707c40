/* STAND-IN for what NCCL writes with NCCL_DEBUG: its lines' format, about a network that a file claims.
 *
 * What there is to claim is planted (see perf.c); what NCCL's own settings forbid is not claimed. Nothing is planted:
 * sockets over the interface that there is, and shared memory, which is what MPI uses here.
 */
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include "nccl.h"
#include "stand_in.h"

char hostname[1024];
unsigned first_bus;
enum { NONE, VERSION, WARN, INFO } static level;
static FILE *out;
static int device;

/* --- what is planted, and NCCL's settings --- */

/* Value of a line "KEY VALUE" of the file, that of "KEY.RANK VALUE" for one rank before it. */
const char *planted(const char *key, const char *otherwise)
{
    static char *text;
    if (!text) {
        const char *name = getenv("NCCL_TESTS_STAND_IN");
        FILE *file = fopen(name ? name : "/etc/stand-in/nccl-tests", "r");
        text = calloc(1, 65536);
        if (file && fread(text, 1, 65534, file))
            strcat(text, "\n");
        if (file)
            fclose(file);
    }
    static char values[8][1024]; /* callers keep a few of them */
    static int next;
    char ranked[128];
    snprintf(ranked, sizeof ranked, "%s.%d", key, ranks.world_rank);
    for (int turn = 0; turn < 2; turn++) {
        const char *wanted = turn ? key : ranked;
        size_t length = strlen(wanted);
        for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
            if (!strncmp(line, wanted, length) && line[length] == ' ') {
                char *value = values[next++ % 8];
                snprintf(value, sizeof *values, "%.*s", (int)strcspn(line + length + 1, "\n"), line + length + 1);
                return value;
            }
    }
    return otherwise;
}

/* NCCL's settings files become variables of the environment, which come first. */
static void read_settings(const char *path)
{
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[1024];
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *equals = strchr(line, '=');
        if (*line == '#' || !equals)
            continue;
        *equals = 0;
        setenv(line, equals + 1, 0);
    }
    if (file)
        fclose(file);
}

static int setting(const char *name, int otherwise)
{
    const char *value = getenv(name);
    return value && *value ? (int)strtol(value, NULL, 0) : otherwise;
}

/* --- lines --- */

static int wanted(const char *subsystems)
{
    const char *list = getenv("NCCL_DEBUG_SUBSYS");
    int without, found = 0;
    if (!strcmp(subsystems, "ALL"))
        return 1;
    if (!list || !*list)
        list = "INIT,BOOTSTRAP,ENV";
    without = *list == '^';
    char mine[128], *rest = mine;
    snprintf(mine, sizeof mine, "%s", subsystems);
    for (char *one; (one = strsep(&rest, "|"));)
        for (const char *at = list + without; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
            size_t length = strcspn(at, ",");
            found |= (length == strlen(one) && !strncasecmp(at, one, length)) || (length == 3 && !strncasecmp(at, "ALL", 3));
        }
    return found != without;
}

static void say(const char *subsystems, const char *format, ...)
{
    va_list arguments;
    if (level < INFO || !wanted(subsystems))
        return;
    va_start(arguments, format);
    fprintf(out, "%s:%d:%d [%d] NCCL INFO ", hostname, getpid(), getpid(), device);
    vfprintf(out, format, arguments);
    fputc('\n', out);
    va_end(arguments);
}

void log_warning(const char *where, const char *text)
{
    char now[64];
    time_t seconds = time(NULL);
    if (level < WARN)
        return;
    strftime(now, sizeof now, "[%F %T] ", localtime(&seconds));
    fprintf(out, "\n%s%s:%d:%d [%d] %s NCCL WARN %s\n", now, hostname, getpid(), getpid(), device, where, text);
}

/* NCCL_DEBUG_FILE, where %h is the host and %p the process. */
static void open_log(void)
{
    const char *name = getenv("NCCL_DEBUG_FILE");
    char path[4096] = "";
    size_t at = 0;
    out = stdout;
    if (level <= VERSION || !name || !*name)
        return;
    for (; *name && at < sizeof path - 300; name++) {
        if (*name != '%')
            path[at++] = *name;
        else if (name[1] == 'h' || name[1] == 'p') {
            at += name[1] == 'h' ? sprintf(path + at, "%.255s", hostname) : sprintf(path + at, "%d", getpid());
            name++;
        } else {
            path[at++] = '%';
            name += name[1] == '%';
        }
    }
    FILE *file = fopen(path, "w");
    if (file) {
        setlinebuf(file);
        out = file;
    }
}

/* Settings that are not NCCL's default, as NCCL tells them. */
static void say_settings(void)
{
    static const char *const numbers[] = {"NCCL_BUFFSIZE", "NCCL_IB_GID_INDEX", "NCCL_IB_TC", "NCCL_IB_DISABLE",
                                          "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE", "NCCL_CROSS_NIC"};
    static const char *const words[] = {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_ALGO",
                                        "NCCL_PROTO", "NCCL_NET_GDR_LEVEL", "NCCL_P2P_LEVEL"};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (getenv(numbers[i]))
            say("ENV", "%s set by environment to %d.", numbers[i], setting(numbers[i], 0));
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (getenv(words[i]))
            say("ENV", "%s set by environment to %s", words[i], getenv(words[i]));
}

void start_log(int number)
{
    const char *asked, *own = getenv("NCCL_CONF_FILE");
    char home[4096];
    int version;
    device = number;
    if (own && *own)
        read_settings(own);
    else if (getenv("HOME")) {
        snprintf(home, sizeof home, "%s/.nccl.conf", getenv("HOME"));
        read_settings(home);
    }
    read_settings("/etc/nccl.conf");
    asked = getenv("NCCL_DEBUG");
    level = !asked ? NONE : !strcasecmp(asked, "VERSION") ? VERSION : !strcasecmp(asked, "WARN") ? WARN
          : !strcasecmp(asked, "INFO") || !strcasecmp(asked, "TRACE") ? INFO : NONE;
    open_log();
    ncclGetVersion(&version);
    char text[64];
    snprintf(text, sizeof text, "NCCL version %d.%d.%d+cudaSTAND-IN", version / 10000, version / 100 % 100, version % 100);
    if (level == INFO)
        say("ALL", "%s", text);
    else if (level != NONE && !ranks.world_rank)
        fprintf(out, "%s\n", text);
}

/* --- what a communicator says of its network --- */

static struct { char net[64], nics[8][64]; int count, gdr, nvls, collnet, p2p, channels; } claims;

/* "eth0:10.1.2.3<0>", of the first interface that is up, by NCCL_SOCKET_IFNAME's prefixes. */
static void interface(char *into, size_t size)
{
    struct ifaddrs *all, *one;
    const char *list = getenv("NCCL_SOCKET_IFNAME");
    snprintf(into, size, "lo:127.0.0.1<0>");
    if (getifaddrs(&all))
        return;
    for (one = all; one; one = one->ifa_next) {
        char address[64];
        if (!one->ifa_addr || one->ifa_addr->sa_family != AF_INET || !(one->ifa_flags & IFF_RUNNING))
            continue;
        if (list && *list ? !strncmp(one->ifa_name, list, strcspn(list, ",")) : !(one->ifa_flags & IFF_LOOPBACK)) {
            inet_ntop(AF_INET, &((struct sockaddr_in *)one->ifa_addr)->sin_addr, address, sizeof address);
            snprintf(into, size, "%s:%s<0>", one->ifa_name, address);
            break;
        }
    }
    freeifaddrs(all);
}

/* Whether NCCL_IB_HCA, such as "=mlx5_0:1,mlx5_1:1" or "mlx5" or "^mlx5_2", admits a NIC such as "mlx5_0:1/RoCE". */
static int admitted(const char *nic)
{
    const char *list = getenv("NCCL_IB_HCA");
    int without, exactly, found = 0;
    if (!list || !*list)
        return 1;
    without = *list == '^';
    exactly = list[without] == '=';
    size_t name = strcspn(nic, ":");
    for (const char *at = list + without + exactly; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        size_t length = strcspn(at, ":,");
        found |= !strncmp(nic, at, length) && (!exactly || length == name);
    }
    return found != without;
}

static void make_claims(void)
{
    char list[1024], *rest = list;
    const char *forced = getenv("NCCL_NET"), *gdr = getenv("NCCL_NET_GDR_LEVEL");
    snprintf(claims.net, sizeof claims.net, "%s", planted("net", "Socket"));
    snprintf(list, sizeof list, "%s", planted("nics", "mlx5_0:1/IB"));
    if (strcmp(claims.net, "Socket"))
        for (char *one; (one = strsep(&rest, " ")) && claims.count < 8;)
            if (*one && (strcmp(claims.net, "IB") || admitted(one)))
                snprintf(claims.nics[claims.count++], sizeof *claims.nics, "%.63s", one);
    if (!claims.count || (!strcmp(claims.net, "IB") && setting("NCCL_IB_DISABLE", 0)) || (forced && !strcasecmp(forced, "Socket")))
        strcpy(claims.net, "Socket"), claims.count = 0;
    claims.gdr = atoi(planted("gdr", "0")) && claims.count && !(gdr && (!strcmp(gdr, "0") || !strcasecmp(gdr, "LOC")));
    claims.nvls = atoi(planted("nvls", "0")) && setting("NCCL_NVLS_ENABLE", 2);
    claims.collnet = atoi(planted("collnet", "0")) && setting("NCCL_COLLNET_ENABLE", 0) && claims.count;
    claims.p2p = claims.nvls || (atoi(planted("p2p", "0")) && !setting("NCCL_P2P_DISABLE", 0));
    claims.channels = 2 * (claims.count ? claims.count : 1);
}

static void say_channels(void)
{
    const int rank = ranks.rank, size = ranks.size, mine = ranks.host_of[rank];
    int local = 0, locals = 0, before, after;
    for (int other = 0; other < size; other++)
        if (ranks.host_of[other] == mine) {
            local += other < rank;
            locals++;
        }
    /* The host before and the host after in the ring of hosts: their first ranks. */
    for (after = (rank + 1) % size; ranks.host_of[after] == mine && after != rank; after = (after + 1) % size)
        ;
    for (before = (rank + size - 1) % size; ranks.host_of[before] == mine && before != rank; before = (before + size - 1) % size)
        ;
    for (int channel = 0; channel < claims.channels; channel++) {
        int nic = claims.count ? channel % claims.count : 0, leaves = channel % locals, enters = (leaves + 1) % locals;
        int peer = rank - local + (local + 1) % locals;
        const char *gdr = claims.gdr ? "/GDRDMA" : "";
        if (ranks.host_of[after] != mine && local == enters)
            say("INIT|NET", "Channel %02d/0 : %d[%d] -> %d[%d] [receive] via NET/%s/%d%s", channel, before, device, rank, device,
                claims.net, nic, gdr);
        if (ranks.host_of[after] != mine && local == leaves)
            say("INIT|NET", "Channel %02d/0 : %d[%d] -> %d[%d] [send] via NET/%s/%d%s", channel, rank, device, after, device,
                claims.net, nic, gdr);
        else if (locals > 1 && claims.p2p)
            say("INIT|P2P", "Channel %02d/0 : %d[%d] -> %d[%d] via P2P/CUMEM", channel, rank, device, peer, device);
        else if (locals > 1)
            say("INIT|SHM", "Channel %02d : %d[%d] -> %d[%d] via SHM/direct", channel, rank, device, peer, device);
    }
    if (claims.collnet && ranks.host_of[after] != mine)
        for (int nic = 0; nic < claims.count; nic++)
            say("INIT|NET", "CollNet %02d/0 : %d [send] via COLLNET/SHARP/%d%s", nic, rank, nic, claims.gdr ? "/GDRDMA" : "");
}

void log_communicator(void)
{
    char address[128], line[1024] = "";
    unsigned bus = first_bus + device;
    make_claims();
    interface(address, sizeof address);
    const char *function = "ncclCommInitRankConfig";
    say("BOOTSTRAP", "Bootstrap: Using %s", address);
    say_settings();
    say("INIT|NET", "NET/Plugin: Could not find: libnccl-net.so");
    for (int nic = 0; nic < claims.count; nic++)
        snprintf(line + strlen(line), sizeof line - strlen(line), " [%d]%s", nic, claims.nics[nic]);
    if (!strcmp(claims.net, "IB"))
        say("INIT|NET", "NET/IB : Using%s [RO]; OOB %s", line, address);
    else if (strcmp(claims.net, "Socket"))
        say("INIT|NET", "NET/Plugin: Loaded net plugin %s (v11)", claims.net);
    else {
        say("INIT|NET", "NET/IB : No device found.");
        say("INIT|NET", "Failed to initialize NET plugin IB");
        say("INIT|NET", "NET/Socket : Using [0]%s", address);
    }
    say("INIT|NET", "Initialized NET plugin %s", claims.net);
    say("INIT|NET", "Assigned NET plugin %s to comm", claims.net);
    say("INIT", "Using network %s", claims.net);
    say("INIT", "[Rank %d] %s comm 0x%x rank %d nranks %d cudaDev %d nvmlDev %d busId %x commId 0x%x - Init START", ranks.rank,
        function, 0x5000 + ranks.rank, ranks.rank, ranks.size, device, device, bus << 12, 0xc0ffee + ranks.color);
    for (int nic = 0; nic < claims.count; nic++)
        say("NET", "NET/%s : GPU Direct RDMA %s for HCA %d '%.*s'", claims.net, claims.gdr ? "Enabled" : "Disabled", nic,
            (int)strcspn(claims.nics[nic], ":"), claims.nics[nic]);
    say("INIT", "NVLS multicast support is %savailable on dev %d", claims.nvls ? "" : "not ", device);
    say_channels();
    say("INIT", "Connected all rings, use ring PXN 0 GDR %d", claims.gdr);
    say("INIT", "Connected all trees");
    if (claims.collnet)
        say("INIT", "rank %d Connected CollNet", ranks.rank);
    say("INIT", "%d coll channels, %d collnet channels, %d nvls channels, %d p2p channels, 2 p2p channels per peer",
        claims.channels, claims.collnet ? claims.channels : 0, claims.nvls ? 16 : 0, claims.channels);
    const char *warning = planted("warn", "");
    if (*warning)
        log_warning("STAND-IN:1", warning);
    say("INIT", "%s comm 0x%x rank %d nranks %d cudaDev %d nvmlDev %d busId %x commId 0x%x - Init COMPLETE", function,
        0x5000 + ranks.rank, ranks.rank, ranks.size, device, device, bus << 12, 0xc0ffee + ranks.color);
}

/* Rank 0 of a communicator tells the algorithm of each collective; those made of sends and receives have none. */
void log_operation(size_t bytes)
{
    static const char *const with[] = {"AllReduce", "AllGather", "ReduceScatter", "Broadcast", "Reduce"};
    int found = 0, sums = test->reduces && !test->rooted, one_host = 1;
    for (size_t i = 0; i < sizeof with / sizeof *with; i++)
        found |= !strcmp(with[i], test->name);
    if (!found || ranks.rank || level < INFO)
        return;
    for (int rank = 0; rank < ranks.size; rank++)
        one_host &= ranks.host_of[rank] == 0;
    const char *algorithm = claims.collnet && sums && !one_host && bytes > 65536 ? "COLLNET_DIRECT"
        : claims.nvls && sums && bytes > 65536 ? (one_host ? "NVLS" : "NVLS_TREE")
        : bytes <= 65536 && !strcmp(test->name, "AllReduce") ? "TREE" : "RING";
    say("TUNING", "%s: %ld Bytes -> Algo %s proto %s channel{Lo..Hi}={0..%d}", test->name, (long)bytes, algorithm,
        bytes <= 65536 ? "LL" : "SIMPLE", claims.channels - 1);
}
