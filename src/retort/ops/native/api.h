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
  const float *cos, *sin;  // [total, rotated]
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

struct RetortKernels {
  void (*linear)(const RetortLinearCall*);
  void (*argmax)(const RetortArgmaxCall*);
  void (*attention)(const RetortAttentionCall*);
  void (*norm)(const RetortNormCall*);
  void (*rotary)(const RetortRotaryCall*);
  void (*decoder)(const RetortDecoderCall*);
};
}
