// Plain C ABI of the native core. Pointers are raw tensor addresses; sizes and strides count elements.
#pragma once
#include <stdint.h>

extern "C" {

// A linear layer packed in panels of 32 outputs, [ceil(n / 32)][k][32], spare outputs zero.
// bf16 panels interleave outputs j and 16 + j, so that one 32-bit lane holds both.
struct RetortLinear {
  const void* weight;
  const float* bias;  // [n], or null
  int64_t k, n, bf16;
  const RetortLinear* up;  // same k and n: the result is silu(this) * up; or null
};

// Several layers of one input, computed in one parallel region.
struct RetortLinearCall {
  const RetortLinear* layers;
  int64_t count;
  const float* x;  // [m, k]
  int64_t ldx, m;
  float* const* out;  // one [m, n] for each layer
  const int64_t* ldo;
  const float* residual;  // added to the first layer's result, or null
  int64_t ldr;
  int32_t threads;
};

// Calls one after the other in one parallel region; the second may read what the first wrote.
struct RetortLinearsCall {
  const RetortLinearCall* calls;
  int64_t count;
  int32_t threads;
};

// The largest output of each row, without storing the outputs.
struct RetortArgmaxCall {
  const RetortLinear* layer;
  const float* x;
  int64_t ldx, m;
  int64_t* index;  // [m]
  float* value;    // [m]
  int32_t threads;
};

// Layout of one packed pass; the same for all layers of a model.
struct RetortRows {
  int64_t rows;
  const int64_t* starts;    // tokens in the cache before the pass
  const int64_t* counts;    // new tokens
  const int64_t* offsets;   // first packed token
  const int64_t* capacity;  // tokens for which the row's buffers have room
  const int64_t* order;     // rows by falling cost
};

// What an attention layer does with a row.
struct RetortHeads {
  int64_t heads, kv_heads, key_width, value_width;
  float scaling, softcap;  // softcap 0: none
  int64_t window;          // 0: none
  const float* sinks;      // [heads], or null
};

struct RetortAttentionCall {
  const RetortRows* rows;
  const RetortHeads* heads;
  const float* q;  // [total, heads, key_width], strides below, last one 1
  int64_t q_token, q_head;
  const float* k;  // new keys, or null where they are in the buffers already
  int64_t k_token, k_head;
  const float* v;
  int64_t v_token, v_head;
  float* const* key_rows;    // for each row [kv_heads, capacity, key_width]
  float* const* value_rows;  // for each row [kv_heads, capacity, value_width]
  float* out;                // [total, heads, value_width]
  int32_t threads;
};

struct RetortNormCall {
  const float* x;
  int64_t ldx, m, n;
  const float* weight;  // [n]
  float eps, offset;    // result x / rms * (offset + weight)
  float* out;           // [m, n]
  int32_t threads;
};

struct RetortRotaryCall {
  const float* x;  // [total, heads, width]
  int64_t x_token, x_head;
  const float *cos, *sin;  // [total, rotated], of pairs [total, rotated / 2]
  int64_t total, heads, width, rotated;
  float* out;  // [total, heads, width]
  int32_t threads;
};

// A decoder layer of the Llama family: norm, attention, residual, norm, gated MLP, residual.
struct RetortDecoder {
  const RetortLinear *query, *output, *gate, *down;  // query: three layers, query, key and value
  const float *attention_norm, *mlp_norm;            // [hidden]
  const float *query_norm, *key_norm;                // [key_width], or null
  float attention_eps, mlp_eps, query_eps, key_eps;
  float attention_offset, mlp_offset, query_offset, key_offset;
  const RetortHeads* heads;
};

struct RetortDecoderCall {
  const RetortDecoder* layer;
  const RetortRows* rows;
  float* const* key_rows;
  float* const* value_rows;
  const float *cos, *sin;  // [total, rotated]
  int64_t rotated, total;
  const float* x;  // [total, hidden]
  float* out;      // [total, hidden]
  int32_t threads;
};

enum RetortActivation {
  RETORT_TANH,
  RETORT_SIGMOID,
  RETORT_SILU,
  RETORT_GELU,
  RETORT_GELU_TANH,
  RETORT_COS,
  RETORT_SIN,
  RETORT_SOFTPLUS,
};

// op(x) of rows, times `other` where there is one: the bits of an element depend on it alone.
struct RetortActivationCall {
  const float* x;
  int64_t ldx, m, n;
  const float* other;  // [m, n] with row stride ldother, or null
  int64_t ldother, op;
  float* out;  // [m, n]
  int32_t threads;
};

// Retention of packed ragged rows; time is cut into blocks of `block` tokens. A token in block b
// reads the state at (b - 1) * block and the tokens of blocks b - 1 and b up to itself.
struct RetortRetention {
  int64_t heads, key_width, value_width, block;
  const float* read;   // [heads, block]
  const float* pair;   // [heads, block, 2 * block]
  const float* write;  // [heads, block]
  const float* carry;  // [heads]
};

struct RetortRetentionCall {
  const RetortRetention* shape;
  int64_t rows;
  const int64_t *starts, *counts, *offsets;
  const float *q, *k, *v;        // [total, heads, width]
  const float* const* states;    // for each row [heads, key_width, value_width], or null
  const float* const* before_k;  // pages [heads, block, width] of the block before the first new
  const float* const* before_v;  // token's, and of its own: what lies there before `starts`; or null
  const float* const* current_k;
  const float* const* current_v;
  const int64_t* moved_block;  // the block whose state goes to `moved`
  float* const* moved;         // for each row [heads, key_width, value_width], or null
  const char* wanted;          // of each token, whether its output is; or null: all are
  float* scores;               // scratch [total, heads, 2 * block]
  float* out;                  // [total, heads, value_width]
  int32_t threads;
};

// state * carry + sum of write_i k_i v_i over the tokens of one block, in place.
struct RetortFoldCall {
  const RetortRetention* shape;
  int64_t count;         // states, each with its page
  float* const* states;  // [heads, key_width, value_width]
  const float* const* keys;
  const float* const* values;
  int64_t fresh;  // the states before are zero, whatever lies there
  int32_t threads;
};

// A DenseRetNet layer: norm, gated retention with fused keys and values, residual; and norm, gated
// MLP, residual where it has one. Absent parts are null.
struct RetortRetNetLayer {
  const RetortLinear* input;  // of the normed input: q, k, v and g together; with gates, the first
                              // half of the keys' and of the values'
  const RetortLinear *key_gate, *value_gate;  // second halves
  const RetortLinear *output, *gate, *down;
  const float *norm, *key_norm, *value_norm, *group_norm, *mlp_norm;
  int64_t window;  // earlier layers whose keys and values are added
};

struct RetortRetNet {
  const RetortRetNetLayer* const* layers;
  int64_t count, window;  // the widest window
  const RetortRetention* retention;
  const float* norm;  // after the last layer
  float eps, scale;   // of every norm; of keys
};

// All layers of a packed pass. A row's state at (b - 1) * block and its pages are given by number,
// as in RetortRetentionCall; -1: none.
struct RetortRetNetCall {
  const RetortRetNet* model;
  int64_t rows, total;
  const int64_t *starts, *counts, *offsets;
  const int64_t *state, *before, *current, *moved_to, *moved_block;
  const float* states;   // [layers, ..., heads, key_width, value_width]
  float *keys, *values;  // pages [layers, ..., heads, block, width]; new tokens are written there
  float* moved;          // [layers, ..., heads, key_width, value_width]
  int64_t state_layer, key_layer, value_layer, moved_layer;  // distances between layers
  const int64_t *positions, *pages;  // of each token; the page it is kept on, or -1
  const float *cos, *sin, *root;     // [total, key_width / 2] twice, [total, heads]
  int64_t wanted;                    // how many tokens' results are
  const int64_t* wanted_tokens;      // which, ascending; the others' are left out
  const float* x;                    // [total, hidden]
  float* out;                        // [wanted, hidden], normed
  int32_t threads;
};

// Selective scan of packed ragged rows: h = exp(dt a) h + dt b u, y = c . h, one token at a time.
struct RetortScanCall {
  int64_t rows, channels, states;
  const int64_t *counts, *offsets;
  const float* a;                    // [states, channels]
  const float *dt, *u, *b, *c;       // [total, channels] twice, [total, states] twice; c may be null
  int64_t ld_dt, ld_u, ld_b, ld_c;   // row strides
  const float* const* initial;       // for each row [states, channels], or null: zero
  const int64_t* kept_ends;          // for each row, one past its last kept state; ascending
  const int64_t* kept_tokens;        // packed tokens after which a state is kept, ascending
  float* const* kept;                // where it goes, [states, channels]
  float* y;                          // [total, channels], or null without c
  int32_t threads;
};

// Gradients of that scan where rows start from nothing; a chunk's states are scanned again.
struct RetortScanGradientCall {
  int64_t rows, channels, states, total, chunk;
  int64_t part;  // channels of one unit of work, which sums its gradients of b and c
  const int64_t *counts, *offsets;
  const int64_t* first_kept;         // of each row, the number of its first kept state
  const float *a, *dt, *u, *b, *c;   // as in RetortScanCall
  int64_t ld_dt, ld_u, ld_b, ld_c;
  const float* kept;                 // [..., states, channels], after each chunk but a row's last
  const float* grad;                 // of y, [total, channels]
  float* grad_a;                     // [rows, states, channels], to be summed over rows
  float *grad_dt, *grad_u;           // [total, channels]
  float* grad_bc;  // [parts of the channels, total, 2, states], to be summed over parts
  int32_t threads;
};

// Causal depthwise convolution of packed ragged rows, plus bias, through silu where asked for.
struct RetortConvCall {
  int64_t rows, channels, kernel, silu;
  const int64_t *counts, *offsets;
  const float* x;  // [total, channels] with row stride ldx
  int64_t ldx;
  const float* history;  // [rows, kernel - 1, channels], oldest first
  const float* weight;   // [channels, kernel]
  const float* bias;     // [channels], or null
  float* out;            // [total, channels]
  int32_t threads;
};

// A DenseMamba layer: norm, mixer with the dense readout, residual. Absent parts are null.
struct RetortMambaLayer {
  const RetortLinear* input;  // of the normed input: x and z together; with a gate, its first half
  const RetortLinear *gate, *parameters, *step, *output;  // gate: second half; parameters: of
                                                          // step, B and C together
  const float* norm;          // [hidden]
  const float* conv_weight;   // [channels, kernel]
  const float* conv_bias;     // [channels], or null
  const float* a;             // [states, channels]
  const float* d;             // [channels]
  int64_t window;             // earlier layers whose states are read
};

struct RetortMamba {
  const RetortMambaLayer* const* layers;
  int64_t count, window, states, kernel;  // the widest window
  const float* norm;                      // after the last layer
  float eps;
};

// All layers of a packed pass. States and pages are given by number; -1: none.
struct RetortMambaCall {
  const RetortMamba* model;
  int64_t rows, total;
  const int64_t *counts, *offsets;
  const int64_t* initial;                  // of each row, its state before the pass
  const int64_t *kept_ends, *kept_tokens;  // as in RetortScanCall
  const int64_t* kept;                     // where kept states go
  const int64_t* last;  // of each row, the state after its last token; one of the kept
  const int64_t *history_pages, *history_offsets;  // [rows, kernel - 1], oldest first
  const int64_t *tape_pages, *tape_offsets;        // of each token
  float* states;  // [layers, ..., states, channels]
  float* fed;     // pages [layers, ..., page, 2 * channels + states]: dt, u and b of tokens
  float* inputs;  // pages [layers, ..., page, channels]: what the convolution reads
  int64_t state_layer, fed_layer, input_layer, page;  // distances between layers; tokens of a page
  const float* x;                                     // [total, hidden]
  float* out;                                         // [total, hidden], normed
  int32_t threads;
};

// All decoder layers of a model, of equal sizes, and the RMSNorm after them.
struct RetortStack {
  const RetortDecoder* const* layers;
  int64_t count;
  const float* norm;  // [hidden]
  float eps, offset;
};

struct RetortStackCall {
  const RetortStack* stack;
  const RetortRows* rows;
  float* const* const* key_rows;  // for each layer
  float* const* const* value_rows;
  const float *cos, *sin;  // [total, rotated]
  int64_t rotated, total;
  const float* x;  // [total, hidden]
  float* out;      // [total, hidden]
  int32_t threads;
};

// Tokens that may win a row's race of score + noise, see race.h; a row is cut into parts.
enum { RETORT_SHORTLIST = 32 };

struct RetortRaceCall {
  const double* scores;  // [rows, vocab] with row stride ld
  int64_t ld, rows, vocab, parts;
  const uint64_t* states;  // [rows], of the noise
  double margin;
  int64_t* tokens;  // [rows, parts, RETORT_SHORTLIST]
  int64_t* counts;  // [rows, parts]; more than RETORT_SHORTLIST where the list is not whole
  int32_t threads;
};

struct RetortKernels {
  void (*linear)(const RetortLinearCall*);
  void (*linears)(const RetortLinearsCall*);
  void (*argmax)(const RetortArgmaxCall*);
  void (*attention)(const RetortAttentionCall*);
  void (*norm)(const RetortNormCall*);
  void (*rotary)(const RetortRotaryCall*);
  void (*decoder)(const RetortDecoderCall*);
  void (*activation)(const RetortActivationCall*);
  void (*rotate_pairs)(const RetortRotaryCall*);
  void (*retention)(const RetortRetentionCall*);
  void (*fold)(const RetortFoldCall*);
  void (*retnet)(const RetortRetNetCall*);
  void (*scan)(const RetortScanCall*);
  void (*scan_gradient)(const RetortScanGradientCall*);
  void (*convolution)(const RetortConvCall*);
  void (*mamba)(const RetortMambaCall*);
  void (*stack)(const RetortStackCall*);
  void (*race)(const RetortRaceCall*);
};
}
