/* Block-sparse attention on a CPU, forward and backward, straight from the plan's lists.

   One side of the plan owns: its rows lie in the lanes of vectors, so that no sum ever runs across
   lanes. The rows of the other side are walked: they are read one after the other, by pointer,
   where they lie in memory. Queries own in the forward pass and for dq, keys own for dk and dv, and
   so every result has one owner and does not depend on the number of threads.

   A block of owners is cut into tiles of TILE rows. Rows of blocks that are seen in full are walked
   for all tiles at once. From partial blocks each tile first takes what its bounding box does not
   exclude; where the box leaves a row undecided, the token rule is evaluated lane by lane.

   The online softmax is FlashAttention-2's (Dao, arXiv:2307.08691). Everything is computed in fp32;
   half-precision rows are widened chunk by chunk. GNU C with vector extensions (GCC, Clang): the
   compiler makes AVX-512, AVX2, SSE or NEON of it. */

#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
/* Vectors side by side in a tile. GROUP * VECTORS sums, VECTORS operands and one more fit into 16
   registers, or into the 32 that NEON has. */
#ifndef VECTORS
#ifdef __aarch64__
#define VECTORS 4
#else
#define VECTORS 2
#endif
#endif
#define GROUP 6
#define TILE (LANES * VECTORS)
/* Owners that share a walk over full blocks, and walked rows at a time: their scores stay in L1. */
#define TILES (TILE >= 128 ? 1 : 128 / TILE)
#define CHUNK (16 * GROUP)
/* Heads that share one look at the token rule; few, so that neighbours' keys stay in the cache. */
#define HEADS_AT_ONCE 4

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float Vector __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), may_alias));

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { DISC = 1, RASTER = 2, BOX = 3 };
enum { OK, NO_MEMORY, BAD_BLOCK };

/* The structures below have their mirror in native.py; steps count elements. */

/* [batch, heads, rows, dim] of any of the three types, with any steps. */
typedef struct {
    const void *data;
    int64_t batch, head, row, column;
} Rows;

/* [batch|1, heads|1, rows] fp32, or none; the steps of a broadcast dimension are 0. */
typedef struct {
    const float *data;
    int64_t batch, head;
} Values;

/* The partition of one side of the plan. */
typedef struct {
    const int32_t *starts, *lengths, *order, *frame, *place, *frame_last, *place_last;
    int64_t blocks;
} Side;

/* Which blocks of the walked side each block of owners sees, full ones first. Without `first` each
   list has `width` entries, and a longer count is a run of full blocks 0, 1, ... without a list. */
typedef struct {
    const int32_t *indices, *count, *full;
    const int64_t *first;
    int64_t width, batch, head;
} Lists;

typedef struct {
    int64_t backward, batch, own_heads, q_heads_per_own, q_heads_per_walked, dim, dtype, threads;
    int64_t metric, num_limits, sink_frames, place_bits, keys_own;
    double scale;
    const int32_t *limits;
    Side own, walked;
    Lists lists;
    /* scores = x a; a second product of y and b in the backward pass, whose y are the gradients of
       out where queries own */
    Rows x, y, a, b, out;
    /* added to scores: log weights of keys, and -lse of queries in the backward pass */
    Values own_bias, walked_bias;
    /* of queries, whichever side they are; delta is made where queries own */
    Values grad_lse, delta;
    /* forward: the epilogue of each block of owners */
    Values out_scale, out_residual;
    /* out or dx; dy is dv. fp32 */
    Rows dx, dy;
    /* [batch, own_heads, num_own]: lse forward, else delta = sum(y * out) */
    float *per_query;
    int64_t num_own;
    /* If not NULL, how many pairs were computed is added here, those hidden afterwards too. */
    int64_t *pairs;
} Problem;

/* Rows being walked, and what is added to their scores. `a` and `b` are fp32 once it is taken, and
   before that wherever and whatever the rows are. */
typedef struct {
    const void *a[CHUNK], *b[CHUNK];
    int32_t position[CHUNK], token[CHUNK];
    float bias[CHUNK], delta[CHUNK], grad_lse[CHUNK];
    int count, asked_for;
} Chunk;

typedef struct {
    int32_t *at;
    int64_t count, room;
} Positions;

/* What one thread works with. */
typedef struct {
    /* [TILES][dim][TILE] */
    float *x, *y, *dx, *dy;
    /* [TILES * TILE]; the state of the softmax, or what the backward pass adds and subtracts */
    float *top, *sum, *bias, *delta, *grad_lse;
    /* [CHUNK][TILE] */
    float *scores, *grads;
    /* [CHUNK][dim] */
    float *wide_a, *wide_b;
    _Alignas(64) int32_t frame[TILES * TILE], row[TILES * TILE], column[TILES * TILE];
    /* the last corner, of queries under the metric BOX */
    _Alignas(64) int32_t frame_last[TILES * TILE], row_last[TILES * TILE], column_last[TILES * TILE];
    int32_t position[TILES * TILE];
    int tiles, rows;
    /* Rows of partial blocks, tile by tile: those that every lane sees, then the undecided ones. */
    Positions seen, undecided;
    int64_t begin[TILES + 1], middle[TILES];
    int64_t culled, pairs;
    /* The one being computed, and the one after it. */
    Chunk *chunk, *next, chunks[2];
} Scratch;

/* Where the walked rows of one head are. */
typedef struct {
    const void *a, *b;
    const float *bias, *delta, *grad_lse;
} Head;

/* ---- vectors ---- */

INLINE Vector load(const float *at) { return *(const Vector *)at; }
INLINE void store(float *at, Vector x) { *(Vector *)at = x; }
INLINE Vector all(float x) { return x - (Vector){0}; }

INLINE Vector choose(Integers where, Vector yes, Vector no)
{
    return (Vector)((where & (Integers)yes) | (~where & (Integers)no));
}

/* exp(x) to about 1e-7 for x < 88; NaN stays, and below the least normal number it is 0. */
INLINE Vector exponential(Vector x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x *= 1.44269504f;
    x = choose(x < -127.0f, all(-127.0f), x);
    Vector shifted = x + round;
    Vector r = x - (shifted - round);
    Vector p = 1.5403530e-4f * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    Integers exponent = (Integers)shifted - (0x4B400000 - 127);
    return p * (Vector)(exponent << 23);
}

/* ---- rows of any type ---- */

static float from_half(uint16_t half)
{
    /* An exponent of 31 is moved twice, to infinity and NaN; one of 0 is a multiple of 2^-24. */
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, exponent = bits & 0x0f800000;
    float value;
    bits += exponent == 0x0f800000 ? 224u << 23 : exponent ? 112u << 23 : 113u << 23;
    memcpy(&value, &bits, 4);
    value -= exponent ? 0.0f : 0x1p-14f;
    return half & 0x8000 ? -value : value;
}

static float from_bfloat(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static const void *head_of(const Rows *rows, int64_t dtype, int64_t batch, int64_t head)
{
    int64_t offset = batch * rows->batch + head * rows->head;
    return (const char *)rows->data + offset * size_of(dtype);
}

static void widen(const Rows *rows, const void *row, int64_t dtype, int64_t dim, float *to)
{
    const int64_t step = rows->column;
    const float *wide = row;
    const uint16_t *half = row;
    if (dtype == FLOAT32)
        for (int64_t d = 0; d < dim; d++) to[d] = wide[d * step];
    else if (dtype == FLOAT16)
        for (int64_t d = 0; d < dim; d++) to[d] = from_half(half[d * step]);
    else
        for (int64_t d = 0; d < dim; d++) to[d] = from_bfloat(half[d * step]);
}

/* Rows here and there are nothing that the hardware would foresee: they are asked for beforehand. */
static const char *row_in_memory(const Rows *rows, const void *head, int64_t dtype, int64_t token)
{
    return (const char *)head + token * rows->row * size_of(dtype);
}

static int lines_of(int64_t dim, int64_t dtype) { return (int)((dim * size_of(dtype) + 63) / 64); }

INLINE void fetch(const char *row, int lines)
{
    for (int line = 0; line < lines; line++) __builtin_prefetch(row + 64 * line, 0, 2);
}

/* Whether rows can be read as they lie. */
static int lies_ready(const Rows *rows, int64_t dtype)
{
    return dtype == FLOAT32 && rows->column == 1;
}

static const float *values_of(const Values *values, int64_t batch, int64_t head)
{
    return values->data ? values->data + batch * values->batch + head * values->head : NULL;
}

static int32_t token_of(const Side *side, int32_t position)
{
    return side->order ? side->order[position] : position;
}

/* ---- the three loops that take the time ---- */

/* Ask for the rows of a chunk before `end`, those that nobody has asked for. */
INLINE void ask_for(Chunk *c, int end, int lines)
{
    for (; c->asked_for < end && c->asked_for < c->count; c->asked_for++) {
        fetch(c->a[c->asked_for], lines);
        fetch(c->b[c->asked_for], lines);
    }
}

/* out[j] = sum over d of rows[j][d] * x[d], a tile of owners at once. Asks for the rows of the next
   chunk on the way. */
static void products(const void *const *rows, int count, const float *x, int64_t dim, float *out,
                     Chunk *next, int lines)
{
    for (int j = 0; j < count; j += GROUP) {
        ask_for(next, j + GROUP < count ? j + GROUP : CHUNK, lines);
        const float *row[GROUP];
        Vector sum[GROUP][VECTORS];
        UNROLL for (int i = 0; i < GROUP; i++) {
            row[i] = rows[j + i];
            UNROLL for (int z = 0; z < VECTORS; z++) sum[i][z] = (Vector){0};
        }
        for (int64_t d = 0; d < dim; d++) {
            Vector lanes[VECTORS];
            UNROLL for (int z = 0; z < VECTORS; z++) lanes[z] = load(x + d * TILE + z * LANES);
            UNROLL for (int i = 0; i < GROUP; i++)
                UNROLL for (int z = 0; z < VECTORS; z++) sum[i][z] += row[i][d] * lanes[z];
        }
        UNROLL for (int i = 0; i < GROUP; i++)
            UNROLL for (int z = 0; z < VECTORS; z++)
                store(out + (j + i) * TILE + z * LANES, sum[i][z]);
    }
}

/* `width` columns of accumulate() from d on. */
INLINE void columns(const void *const *rows, int count, const float *weights, const Vector *keep,
                    float *sums, int64_t d, const int width)
{
    Vector sum[GROUP][VECTORS];
    UNROLL for (int i = 0; i < width; i++)
        UNROLL for (int z = 0; z < VECTORS; z++) sum[i][z] = (Vector){0};
    for (int j = 0; j < count; j++) {
        const float *row = (const float *)rows[j] + d;
        Vector weight[VECTORS];
        UNROLL for (int z = 0; z < VECTORS; z++) weight[z] = load(weights + j * TILE + z * LANES);
        UNROLL for (int i = 0; i < width; i++)
            UNROLL for (int z = 0; z < VECTORS; z++) sum[i][z] += row[i] * weight[z];
    }
    UNROLL for (int i = 0; i < width; i++)
        UNROLL for (int z = 0; z < VECTORS; z++) {
            float *at = sums + (d + i) * TILE + z * LANES;
            store(at, load(at) * keep[z] + sum[i][z]);
        }
}

/* sums[d] = keep * sums[d] + sum over j of rows[j][d] * weights[j]. Each chunk is summed by itself:
   long sums are the more exact for it. */
static void accumulate(const void *const *rows, int count, const float *weights,
                       const Vector *keep, float *sums, int64_t dim)
{
    int64_t d = 0;
    for (; d + GROUP <= dim; d += GROUP) columns(rows, count, weights, keep, sums, d, GROUP);
    for (; d + 4 <= dim; d += 4) columns(rows, count, weights, keep, sums, d, 4);
    for (; d < dim; d++) columns(rows, count, weights, keep, sums, d, 1);
}

/* ---- the token rule ---- */

static void split_place(const Problem *p, int32_t place, int32_t *y, int32_t *x)
{
    *y = p->metric == RASTER ? 0 : place >> p->place_bits;
    *x = p->metric == RASTER ? place : place & ((1 << p->place_bits) - 1);
}

static void place_of(const Problem *p, const Side *side, int32_t position, int32_t *y, int32_t *x)
{
    split_place(p, side->place[position], y, x);
}

/* Which lanes of a tile the rule hides from a walked row under the metric BOX: all ones there. */
static void hidden_by_box(const Problem *p, const Scratch *s, int tile, int32_t position,
                          Integers *hidden)
{
    const int32_t frame = p->walked.frame[position];
    int32_t frame_last = 0, y, x, y_last = 0, x_last = 0;
    place_of(p, &p->walked, position, &y, &x);
    if (p->keys_own) {
        frame_last = p->walked.frame_last[position];
        split_place(p, p->walked.place_last[position], &y_last, &x_last);
    }
    /* Bits of owners that the rule may hide: none from context or from a key of the sink. */
    const int32_t may = frame < 0 || (!p->keys_own && (frame & 0xFFFF) < p->sink_frames) ? 0 : -1;
    UNROLL for (int z = 0; z < VECTORS; z++) {
        const int lane = tile * TILE + z * LANES;
        const Integers own = *(const Integers *)(s->frame + lane);
        const Integers row = *(const Integers *)(s->row + lane);
        const Integers column = *(const Integers *)(s->column + lane);
        Integers free = (own < 0) | (((own ^ frame) >> 16) != 0), outside;
        if (p->keys_own) {
            free |= (own & 0xFFFF) < (int32_t)p->sink_frames;
            outside = (own < frame) | (own > frame_last) | (row < y) | (row > y_last);
            outside |= (column < x) | (column > x_last);
        } else {
            outside = (own > frame) | (*(const Integers *)(s->frame_last + lane) < frame);
            outside |= (row > y) | (*(const Integers *)(s->row_last + lane) < y);
            outside |= (column > x) | (*(const Integers *)(s->column_last + lane) < x);
        }
        hidden[z] = outside & ~free & may;
    }
}

/* The largest distance at which each owner of a tile and rows of a frame see each other; INT_MAX
   where the rule leaves them alone. */
static void limits_to(const Problem *p, const Scratch *s, int tile, int32_t frame, int32_t *limits)
{
    for (int i = 0; i < TILE; i++) {
        int32_t own = s->frame[tile * TILE + i], key = p->keys_own ? own : frame;
        int free = own < 0 || frame < 0 || own >> 16 != frame >> 16;
        free = free || (key & 0xFFFF) < p->sink_frames;
        int64_t apart = free ? 0 : llabs((int64_t)own - frame);
        limits[i] = free ? INT_MAX : p->limits[apart < p->num_limits ? apart : p->num_limits - 1];
    }
}

/* Hide what the rule hides of the scores from `first` on. */
static void apply_rule(const Problem *p, Scratch *s, int tile, int first)
{
    _Alignas(64) int32_t limits[TILE];
    int32_t frame = 0;
    for (int j = first; p->metric == BOX && j < s->chunk->count; j++) {
        Integers hidden[VECTORS];
        hidden_by_box(p, s, tile, s->chunk->position[j], hidden);
        UNROLL for (int z = 0; z < VECTORS; z++) {
            float *at = s->scores + j * TILE + z * LANES;
            store(at, choose(hidden[z], all(-INFINITY), load(at)));
        }
    }
    for (int j = first; p->metric != BOX && j < s->chunk->count; j++) {
        int32_t position = s->chunk->position[j], y, x;
        if (j == first || p->walked.frame[position] != frame) {
            frame = p->walked.frame[position];
            limits_to(p, s, tile, frame, limits);
        }
        place_of(p, &p->walked, position, &y, &x);
        UNROLL for (int z = 0; z < VECTORS; z++) {
            int lane = tile * TILE + z * LANES;
            Integers dy = *(const Integers *)(s->row + lane) - y;
            Integers dx = *(const Integers *)(s->column + lane) - x;
            Integers distance = dy * dy + dx * dx;
            if (p->metric == RASTER) distance = (dx ^ (dx >> 31)) - (dx >> 31);
            Integers hidden = distance > *(const Integers *)(limits + z * LANES);
            float *at = s->scores + j * TILE + z * LANES;
            store(at, choose(hidden, all(-INFINITY), load(at)));
        }
    }
}

static int append(Positions *list, const int32_t *from, int64_t count)
{
    if (list->count + count > list->room) {
        int64_t room = 2 * (list->count + count) + 1024;
        int32_t *at = realloc(list->at, room * sizeof *at);
        if (!at) return 0;
        list->at = at, list->room = room;
    }
    if (from) memcpy(list->at + list->count, from, count * sizeof *from), list->count += count;
    return 1;
}

/* Sort the rows of one partial block by how many lanes of a tile a box hides from them. */
static void cull_boxes(const Problem *p, Scratch *s, int tile, int32_t start, int32_t end)
{
    for (int32_t position = start; position < end; position++) {
        Integers hidden[VECTORS], some = {0}, every = ~(Integers){0};
        hidden_by_box(p, s, tile, position, hidden);
        UNROLL for (int z = 0; z < VECTORS; z++) some |= hidden[z], every &= hidden[z];
        int hides = 0, shows = 0;
        UNROLL for (int i = 0; i < LANES; i++) hides |= some[i], shows |= ~every[i];
        s->seen.at[s->seen.count] = position, s->seen.count += !hides;
        s->undecided.at[s->undecided.count] = position;
        s->undecided.count += hides && shows;
    }
}

/* Sort the rows of one partial block by what the bounding box of a tile tells about them. */
static int cull_block(const Problem *p, Scratch *s, int tile, int32_t block)
{
    const int32_t *row = s->row + tile * TILE, *column = s->column + tile * TILE;
    const int32_t start = p->walked.starts[block], end = start + p->walked.lengths[block];
    if (!append(&s->seen, NULL, end - start) || !append(&s->undecided, NULL, end - start)) return 0;
    if (p->metric == BOX) return cull_boxes(p, s, tile, start, end), 1;
    int64_t y0 = INT_MAX, y1 = INT_MIN, x0 = INT_MAX, x1 = INT_MIN, least = 0, most = 0;
    for (int i = 0; i < TILE; i++) {
        if (s->frame[tile * TILE + i] < 0) continue;
        if (row[i] < y0) y0 = row[i];
        if (row[i] > y1) y1 = row[i];
        if (column[i] < x0) x0 = column[i];
        if (column[i] > x1) x1 = column[i];
    }
    /* Context alone has no box, and sees everything. */
    if (y0 > y1) y0 = y1 = x0 = x1 = 0;
    int32_t frame = 0;
    for (int32_t position = start; position < end; position++) {
        if (position == start || p->walked.frame[position] != frame) {
            int32_t limits[TILE];
            frame = p->walked.frame[position];
            limits_to(p, s, tile, frame, limits);
            least = most = limits[0];
            for (int i = 1; i < TILE; i++) {
                if (limits[i] < least) least = limits[i];
                if (limits[i] > most) most = limits[i];
            }
        }
        int32_t y, x;
        place_of(p, &p->walked, position, &y, &x);
        int64_t below = y0 - y, above = y - y1, left = x0 - x, right = x - x1;
        int64_t dy = below > above ? below : above, dx = left > right ? left : right;
        int64_t far_dy = below < above ? -below : -above, far_dx = left < right ? -left : -right;
        dy = dy > 0 ? dy : 0, dx = dx > 0 ? dx : 0;
        int64_t near = dx, far = far_dx;
        if (p->metric == DISC) near = dy * dy + dx * dx, far = far_dy * far_dy + far_dx * far_dx;
        int seen = least == INT_MAX || far <= least;
        s->seen.at[s->seen.count] = position, s->seen.count += seen;
        s->undecided.at[s->undecided.count] = position;
        s->undecided.count += !seen && (most == INT_MAX || near <= most);
    }
    return 1;
}

/* ---- one chunk of walked rows and one tile of owners ---- */

/* Say which rows the chunk after the current one has. */
static void announce(const Problem *p, Scratch *s, const Head *head, const int32_t *positions,
                     int count)
{
    Chunk *c = s->next;
    c->count = count, c->asked_for = 0;
    memcpy(c->position, positions, count * sizeof *positions);
    for (int j = 0; j < count; j++) {
        const int64_t token = c->token[j] = token_of(&p->walked, positions[j]);
        c->a[j] = row_in_memory(&p->a, head->a, p->dtype, token);
        c->b[j] = row_in_memory(&p->b, head->b, p->dtype, token);
    }
}

/* What was announced becomes the chunk to compute. */
static void take(const Problem *p, Scratch *s, const Head *head)
{
    Chunk *c = s->next;
    const int64_t dim = p->dim;
    s->next = s->chunk, s->next->count = 0;
    s->chunk = c;
    ask_for(c, CHUNK, lines_of(dim, p->dtype));
    if (!lies_ready(&p->a, p->dtype))
        for (int j = 0; j < c->count; j++) {
            widen(&p->a, c->a[j], p->dtype, dim, s->wide_a + j * dim);
            c->a[j] = s->wide_a + j * dim;
        }
    if (!lies_ready(&p->b, p->dtype))
        for (int j = 0; j < c->count; j++) {
            widen(&p->b, c->b[j], p->dtype, dim, s->wide_b + j * dim);
            c->b[j] = s->wide_b + j * dim;
        }
    if (p->walked_bias.data || p->backward)
        for (int j = 0; j < c->count; j++) {
            c->bias[j] = head->bias ? head->bias[c->token[j]] : 0.0f;
            c->delta[j] = head->delta ? head->delta[c->token[j]] : 0.0f;
            c->grad_lse[j] = head->grad_lse ? head->grad_lse[c->token[j]] : 0.0f;
        }
    for (int j = c->count; j % GROUP; j++) c->a[j] = c->a[j - 1], c->b[j] = c->b[j - 1];
}

static void add_bias(Scratch *s)
{
    for (int j = 0; j < s->chunk->count; j++)
        UNROLL for (int z = 0; z < VECTORS; z++) {
            float *at = s->scores + j * TILE + z * LANES;
            store(at, load(at) + s->chunk->bias[j]);
        }
}

static void forward_step(const Problem *p, Scratch *s, int tile, int undecided)
{
    const Chunk *c = s->chunk;
    const int64_t at = (int64_t)tile * p->dim * TILE;
    products(c->a, c->count, s->x + at, p->dim, s->scores, s->next, lines_of(p->dim, p->dtype));
    if (p->walked_bias.data) add_bias(s);
    if (undecided < c->count) apply_rule(p, s, tile, undecided);
    Vector keep[VECTORS];
    UNROLL for (int z = 0; z < VECTORS; z++) {
        float *scores = s->scores + z * LANES, *top_at = s->top + tile * TILE + z * LANES;
        float *sum_at = s->sum + tile * TILE + z * LANES;
        const Vector before = load(top_at);
        Vector top = before, sum = {0};
        for (int j = 0; j < c->count; j++) {
            Vector score = load(scores + j * TILE);
            top = choose(score > top, score, top);
        }
        /* A lane that has seen nothing yet keeps a finite pivot: inf - inf would be NaN. */
        Vector pivot = choose(top == -INFINITY, all(0.0f), top);
        for (int j = 0; j < c->count; j++) {
            Vector weight = exponential(load(scores + j * TILE) - pivot);
            store(scores + j * TILE, weight);
            sum += weight;
        }
        keep[z] = exponential(before - pivot);
        store(top_at, top);
        store(sum_at, load(sum_at) * keep[z] + sum);
    }
    accumulate(c->b, c->count, s->scores, keep, s->dx + at, p->dim);
}

static void backward_step(const Problem *p, Scratch *s, int tile, int undecided)
{
    const Chunk *c = s->chunk;
    const int64_t at = (int64_t)tile * p->dim * TILE;
    Vector keep[VECTORS];
    products(c->a, c->count, s->x + at, p->dim, s->scores, s->next, lines_of(p->dim, p->dtype));
    if (p->walked_bias.data) add_bias(s);
    if (undecided < c->count) apply_rule(p, s, tile, undecided);
    products(c->b, c->count, s->y + at, p->dim, s->grads, s->next, lines_of(p->dim, p->dtype));
    UNROLL for (int z = 0; z < VECTORS; z++) {
        const int lane = tile * TILE + z * LANES;
        const Vector bias = load(s->bias + lane), delta = load(s->delta + lane);
        const Vector grad_lse = load(s->grad_lse + lane);
        keep[z] = all(1.0f);
        for (int j = 0; j < c->count; j++) {
            float *score_at = s->scores + j * TILE + z * LANES;
            float *grad_at = s->grads + j * TILE + z * LANES;
            Vector weight = exponential(load(score_at) + bias);
            store(score_at, weight);
            /* The difference first: where a query sees one key, it is exactly 0. */
            Vector grad = load(grad_at) - (delta + c->delta[j]);
            store(grad_at, weight * (grad + (grad_lse + c->grad_lse[j])));
        }
    }
    if (p->keys_own) accumulate(c->b, c->count, s->scores, keep, s->dy + at, p->dim);
    accumulate(c->a, c->count, s->grads, keep, s->dx + at, p->dim);
}

static void step(const Problem *p, Scratch *s, int tile, int undecided)
{
    s->pairs += (int64_t)s->chunk->count * TILE;
    if (p->backward) backward_step(p, s, tile, undecided);
    else forward_step(p, s, tile, undecided);
}

/* ---- one panel of owners: up to TILES tiles of one block ---- */

/* Fill tiles with the rows of a block from `first` on, near ones into one tile. */
static void take_rows(const Problem *p, Scratch *s, int32_t block, int32_t first)
{
    const int32_t left = p->own.lengths[block] - first;
    s->rows = left < TILES * TILE ? left : TILES * TILE;
    s->tiles = (s->rows + TILE - 1) / TILE;
    uint64_t keys[TILES * TILE];
    for (int i = 0; i < s->rows; i++) {
        int32_t position = p->own.starts[block] + first + i, y, x;
        uint64_t key = 0;
        if (p->metric) {
            place_of(p, &p->own, position, &y, &x);
            /* by frame and then by cells of 4 rows; a block is small, so 16 bits of each do */
            key = (uint64_t)(uint16_t)p->own.frame[position] << 32;
            if (p->metric != RASTER) key |= (uint64_t)(y / 4) << 16 | (uint64_t)(x / (TILE / 4));
        }
        int at = i;
        for (; at > 0 && keys[at - 1] > key; at--) {
            keys[at] = keys[at - 1];
            s->position[at] = s->position[at - 1];
        }
        keys[at] = key;
        s->position[at] = position;
    }
    for (int i = 0; i < s->tiles * TILE; i++) {
        if (i >= s->rows) s->position[i] = s->position[s->rows - 1];
        if (!p->metric) continue;
        s->frame[i] = p->own.frame[s->position[i]];
        place_of(p, &p->own, s->position[i], s->row + i, s->column + i);
        if (p->metric != BOX || p->keys_own) continue;
        s->frame_last[i] = p->own.frame_last[s->position[i]];
        split_place(p, p->own.place_last[s->position[i]], s->row_last + i, s->column_last + i);
    }
}

static void load_tiles(const Problem *p, Scratch *s, const Rows *rows, const void *head,
                       float factor, float *to)
{
    const int lines = lines_of(p->dim, p->dtype);
    for (int i = 0; i < s->rows; i++) {
        const int64_t token = token_of(&p->own, s->position[i]);
        fetch(row_in_memory(rows, head, p->dtype, token), lines);
    }
    for (int i = 0; i < s->tiles * TILE; i++) {
        const int64_t dim = p->dim, token = token_of(&p->own, s->position[i]);
        const void *at = row_in_memory(rows, head, p->dtype, token);
        const float *row = at;
        if (!lies_ready(rows, p->dtype)) widen(rows, at, p->dtype, dim, s->wide_a), row = s->wide_a;
        float *lane = to + i / TILE * dim * TILE + i % TILE;
        for (int64_t d = 0; d < dim; d++) lane[d * TILE] = row[d] * factor;
    }
}

static void load_values(const Problem *p, Scratch *s, const Values *values, int64_t batch,
                        int64_t head, float *to)
{
    const float *from = values_of(values, batch, head);
    for (int i = 0; i < s->tiles * TILE; i++)
        to[i] = from ? from[token_of(&p->own, s->position[i])] : 0.0f;
}

static void store_gradients(const Problem *p, const Scratch *s, const Rows *rows, int64_t batch,
                            int64_t head, float factor, const float *from)
{
    float *to = (float *)head_of(rows, FLOAT32, batch, head);
    for (int i = 0; i < s->rows; i++) {
        float *out = to + token_of(&p->own, s->position[i]) * rows->row;
        const float *lane = from + i / TILE * p->dim * TILE + i % TILE;
        for (int64_t d = 0; d < p->dim; d++) out[d * rows->column] = lane[d * TILE] * factor;
    }
}

static void store_outputs(const Problem *p, const Scratch *s, int64_t batch, int64_t head,
                          int32_t block)
{
    float *to = (float *)head_of(&p->dx, FLOAT32, batch, head);
    float *lse = p->per_query + (batch * p->own_heads + head) * p->num_own;
    const float *scale = values_of(&p->out_scale, batch, head);
    const float *residual = values_of(&p->out_residual, batch, head);
    if (residual) residual += block * p->dim;
    for (int i = 0; i < s->rows; i++) {
        const int64_t token = token_of(&p->own, s->position[i]);
        float *out = to + token * p->dx.row;
        const float *lane = s->dx + i / TILE * p->dim * TILE + i % TILE;
        const float share = s->sum[i] == 0.0f ? 0.0f : (scale ? scale[block] : 1.0f) / s->sum[i];
        for (int64_t d = 0; d < p->dim; d++)
            out[d * p->dx.column] = lane[d * TILE] * share + (residual ? residual[d] : 0.0f);
        lse[token] = s->top[i] + logf(s->sum[i]);
    }
}

/* delta of each query, summed up as products() does. */
static void make_delta(const Problem *p, Scratch *s, int64_t batch, int64_t head)
{
    float *out = s->dy, *to = p->per_query + (batch * p->own_heads + head) * p->num_own;
    load_tiles(p, s, &p->out, head_of(&p->out, p->dtype, batch, head), 1.0f, out);
    load_values(p, s, &p->grad_lse, batch, head, s->grad_lse);
    for (int tile = 0; tile < s->tiles; tile++) {
        const int64_t at = tile * p->dim * TILE;
        Vector sum[VECTORS];
        UNROLL for (int z = 0; z < VECTORS; z++) sum[z] = (Vector){0};
        for (int64_t d = 0; d < p->dim; d++)
            UNROLL for (int z = 0; z < VECTORS; z++) {
                const int64_t lanes = at + d * TILE + z * LANES;
                sum[z] += load(s->y + lanes) * load(out + lanes);
            }
        UNROLL for (int z = 0; z < VECTORS; z++) store(s->delta + tile * TILE + z * LANES, sum[z]);
    }
    for (int i = 0; i < s->rows; i++) to[token_of(&p->own, s->position[i])] = s->delta[i];
}

/* Entry `i` of a list; -1 where it names no block. */
static int32_t listed(const Problem *p, int64_t list, int64_t count, int64_t i)
{
    const Lists *lists = &p->lists;
    int64_t at = lists->first ? lists->first[list] : list * lists->width;
    int64_t block = !lists->first && count > lists->width ? i : lists->indices[at + i];
    return block >= 0 && block < p->walked.blocks ? (int32_t)block : -1;
}

static int cull(const Problem *p, Scratch *s, int64_t list)
{
    const int64_t count = p->lists.count[list];
    s->seen.count = 0;
    for (int tile = 0; tile < s->tiles; tile++) {
        s->begin[tile] = s->seen.count;
        s->undecided.count = 0;
        for (int64_t i = p->lists.full[list]; p->metric && i < count; i++) {
            int32_t block = listed(p, list, count, i);
            if (block < 0) return BAD_BLOCK;
            if (!cull_block(p, s, tile, block)) return NO_MEMORY;
        }
        s->middle[tile] = s->seen.count;
        if (!append(&s->seen, s->undecided.at, s->undecided.count)) return NO_MEMORY;
    }
    s->begin[s->tiles] = s->seen.count;
    s->culled = list;
    return OK;
}

/* Positions in the full blocks of a list, chunk by chunk. */
typedef struct {
    int64_t list, count, full, entry;
    int32_t position, end;
} Cursor;

/* How many of the next positions were written to `to`, at most CHUNK; -1 for a bad block. */
static int advance(const Problem *p, Cursor *at, int32_t *to)
{
    int found = 0;
    while (found < CHUNK) {
        if (at->position == at->end) {
            if (at->entry == at->full) break;
            int32_t block = listed(p, at->list, at->count, at->entry++);
            if (block < 0) return -1;
            at->position = p->walked.starts[block];
            at->end = at->position + p->walked.lengths[block];
            continue;
        }
        to[found++] = at->position++;
    }
    return found;
}

/* The end of the chunk of partial blocks that begins at `at`; `tile` becomes the tile it is for. */
static int64_t piece(const Scratch *s, int *tile, int64_t at)
{
    if (at == s->begin[s->tiles]) return at;
    while (at == s->begin[*tile + 1]) ++*tile;
    const int64_t end = s->begin[*tile + 1];
    return end - at < CHUNK ? end : at + CHUNK;
}

static int walk(const Problem *p, Scratch *s, const Head *head, int64_t list)
{
    const int64_t count = p->lists.count[list], full = p->lists.full[list];
    Cursor cursor = {list, count, full < count ? full : count, 0, 0, 0};
    int32_t next[CHUNK];
    int found = advance(p, &cursor, next);
    if (found > 0) announce(p, s, head, next, found);
    while (found > 0) {
        take(p, s, head);
        found = advance(p, &cursor, next);
        if (found > 0) announce(p, s, head, next, found);
        for (int tile = 0; tile < s->tiles; tile++) step(p, s, tile, s->chunk->count);
    }
    if (found < 0) return BAD_BLOCK;
    if (s->culled != list) {
        int status = cull(p, s, list);
        if (status != OK) return status;
    }
    /* Chunks of partial blocks have one tile each. */
    int tile = 0;
    int64_t at = 0, end = piece(s, &tile, at);
    if (at < end) announce(p, s, head, s->seen.at, (int)(end - at));
    while (at < end) {
        const int64_t decided = s->middle[tile] - at;
        const int own = tile;
        take(p, s, head);
        at = end, end = piece(s, &tile, at);
        if (at < end) announce(p, s, head, s->seen.at + at, (int)(end - at));
        const int n = s->chunk->count;
        step(p, s, own, decided < 0 ? 0 : decided < n ? (int)decided : n);
    }
    return OK;
}

/* The owners `first ...` of a block, in some batch rows and heads. */
static int panel(const Problem *p, Scratch *s, int32_t block, int32_t first, int64_t from, int64_t to)
{
    take_rows(p, s, block, first);
    s->culled = -1;
    for (int64_t owner = from; owner < to; owner++) {
        const int64_t batch = owner / p->own_heads, own_head = owner % p->own_heads;
        const int64_t values = s->tiles * p->dim * TILE;
        const float scale = (float)p->scale;
        load_tiles(p, s, &p->x, head_of(&p->x, p->dtype, batch, own_head), scale, s->x);
        memset(s->dx, 0, values * sizeof(float));
        if (p->backward) {
            load_tiles(p, s, &p->y, head_of(&p->y, p->dtype, batch, own_head), 1.0f, s->y);
            if (!p->keys_own) make_delta(p, s, batch, own_head);
            else memset(s->dy, 0, values * sizeof(float));
        }
        for (int i = 0; i < s->tiles * TILE; i++) s->top[i] = -INFINITY, s->sum[i] = 0.0f;
        for (int64_t i = 0; i < p->q_heads_per_own; i++) {
            const int64_t q_head = own_head * p->q_heads_per_own + i;
            const int64_t walked_head = q_head / p->q_heads_per_walked;
            Head head = {head_of(&p->a, p->dtype, batch, walked_head),
                         head_of(&p->b, p->dtype, batch, walked_head),
                         values_of(&p->walked_bias, batch, q_head), NULL, NULL};
            if (p->keys_own) {
                head.delta = values_of(&p->delta, batch, q_head);
                head.grad_lse = values_of(&p->grad_lse, batch, q_head);
            }
            if (p->backward) load_values(p, s, &p->own_bias, batch, q_head, s->bias);
            const int64_t list = batch * p->lists.batch + q_head * p->lists.head;
            int status = walk(p, s, &head, list * p->own.blocks + block);
            if (status != OK) return status;
        }
        if (!p->backward) {
            store_outputs(p, s, batch, own_head, block);
            continue;
        }
        store_gradients(p, s, &p->dx, batch, own_head, scale, s->dx);
        if (p->keys_own) store_gradients(p, s, &p->dy, batch, own_head, 1.0f, s->dy);
    }
    return OK;
}

/* ---- threads ---- */

typedef struct {
    int32_t block, first;
} Panel;

typedef struct {
    const Problem *problem;
    const Panel *panels;
    int64_t num_panels, units, owners, owners_at_once, next;
    int status;
} Job;

static float *cut(char **memory, int64_t values)
{
    float *at = (float *)*memory;
    *memory += (values * sizeof(float) + 63) / 64 * 64;
    return at;
}

static void *work(void *argument)
{
    Job *job = argument;
    const Problem *p = job->problem;
    const int64_t tiles = TILES * TILE * p->dim, lanes = TILES * TILE;
    const int64_t chunk = CHUNK * TILE, wide = CHUNK * p->dim;
    char *memory = NULL, *next;
    Scratch *s = NULL;
    int status = NO_MEMORY;
    int64_t size = (4 * tiles + 5 * lanes + 2 * chunk + 2 * wide) * sizeof(float) + 16 * 64;
    if (posix_memalign((void **)&s, 64, sizeof *s) == 0) {
        memset(s, 0, sizeof *s);
        s->chunk = s->chunks, s->next = s->chunks + 1;
        if (posix_memalign((void **)&memory, 64, size) == 0) status = OK;
    }
    if (status == OK) {
        memset(memory, 0, size);
        next = memory;
        s->x = cut(&next, tiles), s->y = cut(&next, tiles);
        s->dx = cut(&next, tiles), s->dy = cut(&next, tiles);
        s->top = cut(&next, lanes), s->sum = cut(&next, lanes);
        s->bias = cut(&next, lanes), s->delta = cut(&next, lanes);
        s->grad_lse = cut(&next, lanes);
        s->scores = cut(&next, chunk), s->grads = cut(&next, chunk);
        s->wide_a = cut(&next, wide), s->wide_b = cut(&next, wide);
    }
    while (status == OK) {
        int64_t unit = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (unit >= job->units) break;
        Panel at = job->panels[unit % job->num_panels];
        int64_t from = unit / job->num_panels * job->owners_at_once;
        int64_t to = from + job->owners_at_once;
        status = panel(p, s, at.block, at.first, from, to < job->owners ? to : job->owners);
    }
    if (status != OK) __atomic_store_n(&job->status, status, __ATOMIC_RELAXED);
    if (s && p->pairs) __atomic_fetch_add(p->pairs, s->pairs, __ATOMIC_RELAXED);
    if (s) free(s->seen.at), free(s->undecided.at);
    free(memory);
    free(s);
    return NULL;
}

/* Threads live as long as the call: nothing is left that a fork could lose. */
static int run_threads(Job *job, int64_t threads)
{
    pthread_t *others = malloc((threads > 1 ? threads : 1) * sizeof *others);
    int64_t started = 0;
    if (!others) return NO_MEMORY;
    while (started + 1 < threads && pthread_create(others + started, NULL, work, job) == 0)
        started++;
    work(job);
    while (started > 0) pthread_join(others[--started], NULL);
    free(others);
    return job->status;
}

/* 0, or why there is no result. */
__attribute__((visibility("default"))) int dittfast_attend(const Problem *p)
{
    int64_t count = 0;
    for (int64_t b = 0; b < p->own.blocks; b++)
        count += (p->own.lengths[b] + TILES * TILE - 1) / (TILES * TILE);
    Panel *panels = malloc((count ? count : 1) * sizeof *panels);
    if (!panels) return NO_MEMORY;
    count = 0;
    for (int64_t b = 0; b < p->own.blocks; b++)
        for (int32_t first = 0; first < p->own.lengths[b]; first += TILES * TILE)
            panels[count++] = (Panel){(int32_t)b, first};
    Job job = {p, panels, count, 0, p->batch * p->own_heads, 1, 0, OK};
    if (!p->lists.batch && !p->lists.head) {
        job.owners_at_once = HEADS_AT_ONCE;
        while (job.owners_at_once > 1 &&
               count * (job.owners / job.owners_at_once) < 4 * p->threads)
            job.owners_at_once /= 2;
    }
    job.units = count * ((job.owners + job.owners_at_once - 1) / job.owners_at_once);
    int status = run_threads(&job, p->threads < job.units ? p->threads : job.units);
    free(panels);
    return status;
}

/* What the compiler made of the vectors. */
__attribute__((visibility("default"))) const char *dittfast_instructions(void)
{
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__AVX__)
    return "AVX";
#elif defined(__SSE2__)
    return "SSE2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "no vector instructions";
#endif
}
