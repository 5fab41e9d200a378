// Runs the library's functions for another process, on another architecture than its own.
//
// A call is a function's number with its arguments: numbers, and addresses in the caller's memory. What
// lies there is asked for, copied before a page that nobody may touch, and goes back if the function
// writes it. See emulated.py, which answers.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "abi.h"

namespace {

constexpr size_t PAGE = 4096, LANES = 16, GROUP = 32;

struct Call {
  uint64_t function, arguments[9];
};
struct Message {
  uint64_t kind, address, size;
};
enum : uint64_t { READ, WRITE, RESULT };

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

void receive(void* data, size_t size) {
  for (char* at = (char*)data; size;) {
    const ssize_t done = read(STDIN_FILENO, at, size);
    if (done <= 0) exit(done < 0);
    at += done, size -= done;
  }
}

void send(const void* data, size_t size) {
  for (const char* at = (const char*)data; size;) {
    const ssize_t done = write(STDOUT_FILENO, at, size);
    if (done <= 0) exit(1);
    at += done, size -= done;
  }
}

void send(Message message) { send(&message, sizeof message); }

// What one call reads and writes.
class Memory {
 public:
  ~Memory() {
    for (const Piece& each : written_) {
      send({WRITE, each.theirs, each.size});
      send(each.mine, each.size);
    }
    for (const Block& each : blocks_) munmap(each.base, each.size);
  }

  // Bytes before a page that nobody may touch.
  void* room(size_t size) {
    const size_t whole = round_up(size, PAGE);
    void* const base = mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect((char*)base + whole, PAGE, PROT_NONE)) abort();
    blocks_.push_back({base, whole + PAGE});
    return (char*)base + whole - size;
  }

  // Replaces the caller's address by that of a copy. Null stays.
  template <class T>
  void copy(T*& pointer, size_t size) {
    if (!pointer || !size) return;
    void* const mine = room(size);
    fetch((uint64_t)pointer, mine, size);
    pointer = (T*)mine;
  }

  // The same copy for all pointers to one array, which heads under several private parts share.
  template <class T>
  void copy_once(T*& pointer, size_t size) {
    const std::pair<const void*, size_t> array{pointer, size};
    if (!copies_.count(array)) {
      copy(pointer, size);
      copies_[array] = pointer;
    }
    pointer = (T*)copies_[array];
  }

  // A copy that goes back.
  template <class T>
  void share(T*& pointer, size_t size) {
    const uint64_t theirs = (uint64_t)pointer;
    copy(pointer, size);
    if (theirs && size) written_.push_back({theirs, (void*)pointer, size});
  }

  // Some bytes of an array that goes back: `offset` bytes behind `theirs` and behind `mine`.
  void share_part(void* theirs, void* mine, size_t offset, size_t size) {
    fetch((uint64_t)theirs + offset, (char*)mine + offset, size);
    written_.push_back({(uint64_t)theirs + offset, (char*)mine + offset, size});
  }

 private:
  struct Block {
    void* base;
    size_t size;
  };
  struct Piece {
    uint64_t theirs;
    void* mine;
    size_t size;
  };
  std::vector<Block> blocks_;
  std::vector<Piece> written_;
  std::map<std::pair<const void*, size_t>, const void*> copies_;

  void fetch(uint64_t theirs, void* mine, size_t size) {
    send({READ, theirs, size});
    receive(mine, size);
  }
};

// A matrix's inputs and outputs.
struct Shape {
  size_t inputs, outputs;
};

size_t element_size(int32_t half) { return half ? 2 : 4; }

void copy_matrix(Memory& memory, lorastack_matrix& matrix, size_t element) {
  const size_t outputs = matrix.panels * LANES, weights = outputs * matrix.k;
  const size_t sizes[] = {weights * element, weights, weights / 2};
  const size_t scales[] = {0, outputs, outputs * (matrix.k / GROUP)};
  memory.copy(matrix.weight, sizes[matrix.kind]);
  memory.copy(matrix.bias, outputs * sizeof(float));
  memory.copy(matrix.scales, scales[matrix.kind] * sizeof(uint16_t));
}

// shapes: of what each segment's targets adapt.
void copy_segments(Memory& memory, const lorastack_segment*& segments, int count,
                   const std::vector<Shape>& shapes, size_t element) {
  memory.copy(segments, count * sizeof *segments);
  for (int s = 0; s < count; s++) {
    const lorastack_target*& targets = const_cast<lorastack_segment&>(segments[s]).targets;
    memory.copy(targets, shapes.size() * sizeof *targets);
    for (size_t i = 0; i < shapes.size(); i++) {
      lorastack_target& target = const_cast<lorastack_target&>(targets[i]);
      memory.copy(target.a, target.rank * shapes[i].inputs * element);
      memory.copy(target.b, target.rank * shapes[i].outputs * element);
    }
  }
}

std::vector<Shape> shapes_of(const lorastack_model& model) {
  const size_t hidden = model.hidden, inner = model.inner, vocabulary = model.vocabulary;
  const size_t query = model.heads * model.head_dim, key = model.kv_heads * model.head_dim;
  const Shape layer[] = {{hidden, query}, {hidden, key},   {hidden, key},  {query, hidden},
                         {hidden, inner}, {hidden, inner}, {inner, hidden}};
  std::vector<Shape> shapes;
  for (int i = 0; i < model.num_layers; i++) shapes.insert(shapes.end(), layer, std::end(layer));
  shapes.push_back({hidden, vocabulary});
  return shapes;
}

// Pages of the rows are shared, others are zero.
void share_kv(Memory& memory, void*& kv, const lorastack_step& step, size_t page_size,
              size_t slots_of_page) {
  std::vector<int32_t> pages;
  for (int r = 0; r < step.num_rows; r++) {
    const lorastack_row& row = step.rows[r];
    const size_t slots = row.committed + row.end - row.start;
    pages.insert(pages.end(), row.pages, row.pages + round_up(slots, slots_of_page) / slots_of_page);
  }
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  void* const mine = memory.room(pages.empty() ? 0 : (pages.back() + 1) * page_size);
  for (int32_t page : pages) memory.share_part(kv, mine, page * page_size, page_size);
  kv = mine;
}

uint64_t run_forward(lorastack_model* model, lorastack_step* step) {
  Memory memory;
  memory.copy(model, sizeof *model);
  memory.copy(step, sizeof *step);
  const size_t element = element_size(model->half), hidden = model->hidden * element;
  const size_t outputs = step->num_outputs;
  int positions = 0;
  memory.copy(step->rows, step->num_rows * sizeof *step->rows);
  for (int r = 0; r < step->num_rows; r++) {
    lorastack_row& row = const_cast<lorastack_row&>(step->rows[r]);
    const int tokens = row.end - row.start, slots = row.committed + tokens;
    positions = std::max(positions, slots);
    memory.copy(row.pages, round_up(slots, model->page_size) / model->page_size * sizeof(int32_t));
    memory.copy(row.parents, tokens * sizeof(int32_t));
  }
  copy_segments(memory, step->segments, step->num_segments, shapes_of(*model), element);
  memory.copy(step->tokens, step->num_tokens * sizeof *step->tokens);
  memory.copy(step->embedded, (size_t)step->num_tokens * model->hidden * sizeof(float));
  memory.copy(step->outputs, outputs * sizeof *step->outputs);
  memory.share(step->out, round_up(outputs, 32) * hidden);
  memory.share(step->logits, outputs * model->vocabulary * sizeof(float));
  memory.share(step->peaks, outputs * sizeof(float));
  memory.share(step->best, outputs * sizeof(int64_t));

  memory.copy(model->layers, model->num_layers * sizeof *model->layers);
  for (int i = 0; i < model->num_layers; i++) {
    lorastack_layer& layer = const_cast<lorastack_layer&>(model->layers[i]);
    memory.copy(layer.attention_norm, hidden);
    memory.copy(layer.mlp_norm, hidden);
    for (auto* each : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
      copy_matrix(memory, *each, element);
    const size_t slot = 2 * model->kv_heads * model->head_dim * element;
    share_kv(memory, layer.kv, *step, model->page_size * slot, model->page_size);
  }
  copy_matrix(memory, model->lm_head, element);
  memory.copy(model->embed, model->vocabulary * hidden);
  memory.copy(model->norm, hidden);
  const size_t angles = (size_t)positions * (model->head_dim / 2) * sizeof(float);
  memory.copy(model->cosine, angles);
  memory.copy(model->sine, angles);

  const size_t scratch = round_up(lorastack_scratch_bytes(model, step), 64);
  step->scratch = memory.room(scratch);
  memset(step->scratch, 255, scratch);
  lorastack_forward(model, step);
  return 0;
}

uint64_t run_logits(lorastack_lm_head* head) {
  Memory memory;
  memory.copy(head, sizeof *head);
  const size_t element = element_size(head->half), rows = head->rows;
  const size_t inputs = head->inputs, outputs = head->outputs;
  copy_matrix(memory, head->matrix, element);
  copy_segments(memory, head->segments, head->num_segments, {{inputs, outputs}}, element);
  memory.copy(head->x, round_up(rows, 32) * inputs * element);
  memory.share(head->out, rows * outputs * sizeof(float));
  lorastack_logits(head);
  return 0;
}

uint64_t run_propose(lorastack_proposal* proposal) {
  Memory memory;
  memory.copy(proposal, sizeof *proposal);
  const size_t element = element_size(proposal->half), hidden = proposal->hidden * element;
  size_t rows = 0, states = 0;
  memory.copy(proposal->groups, proposal->num_groups * sizeof *proposal->groups);
  for (int g = 0; g < proposal->num_groups; g++) {
    lorastack_heads& heads = const_cast<lorastack_heads&>(proposal->groups[g]);
    const size_t blocks = (size_t)heads.blocks * heads.heads;
    memory.copy_once(heads.weight, blocks * proposal->hidden * hidden);
    memory.copy_once(heads.bias, blocks * hidden);
    memory.copy_once(heads.output, (heads.own ? heads.heads : 1) * heads.outputs * hidden);
    memory.copy_once(heads.ids, heads.outputs * sizeof(int64_t));
    memory.copy(heads.a, blocks * heads.rank * hidden);
    memory.copy(heads.b, blocks * heads.rank * hidden);
    rows = std::max<size_t>(rows, heads.end);
    states += (heads.end - heads.start) * heads.heads;
  }
  memory.copy(proposal->x, rows * hidden);
  memory.share(proposal->states, states * hidden);
  memory.share(proposal->tokens, states * proposal->num * sizeof(int64_t));
  memory.share(proposal->logprobs, states * proposal->num * sizeof(float));
  lorastack_propose(proposal);
  return 0;
}

uint64_t run_best(const uint64_t* arguments) {
  Memory memory;
  auto* logits = (const float*)arguments[1];
  auto* values = (float*)arguments[4];
  auto* places = (int64_t*)arguments[5];
  const size_t rows = arguments[2], columns = arguments[3];
  memory.copy(logits, rows * columns * sizeof(float));
  memory.share(values, rows * sizeof(float));
  memory.share(places, rows * sizeof(int64_t));
  lorastack_best(arguments[0], logits, rows, columns, values, places, arguments[6]);
  return 0;
}

uint64_t run_top(const uint64_t* arguments) {
  Memory memory;
  auto* logits = (const float*)arguments[1];
  auto* places = (int64_t*)arguments[5];
  auto* logprobs = (float*)arguments[6];
  const size_t rows = arguments[2], columns = arguments[3], num = arguments[4];
  memory.copy(logits, rows * columns * sizeof(float));
  memory.share(places, rows * num * sizeof(int64_t));
  memory.share(logprobs, rows * num * sizeof(float));
  lorastack_top(arguments[0], logits, rows, columns, num, places, logprobs, arguments[7]);
  return 0;
}

uint64_t run_sample_rows(const uint64_t* arguments) {
  Memory memory;
  auto* logits = (const float*)arguments[1];
  auto* samples = (const lorastack_sample*)arguments[4];
  auto* tokens = (int64_t*)arguments[6];
  const size_t stride = arguments[2], columns = arguments[3], count = arguments[5];
  memory.copy(samples, count * sizeof *samples);
  size_t floats = 0;
  for (size_t i = 0; i < count; i++)
    floats = std::max(floats, samples[i].row * stride + columns);
  memory.copy(logits, floats * sizeof(float));
  memory.share(tokens, count * sizeof(int64_t));
  lorastack_sample_rows(arguments[0], logits, stride, columns, samples, count, tokens,
                        arguments[7]);
  return 0;
}

uint64_t run_quantise(const uint64_t* arguments) {
  Memory memory;
  auto* weights = (const uint16_t*)arguments[1];
  auto* codes = (int8_t*)arguments[5];
  auto* scales = (uint16_t*)arguments[6];
  const size_t rows = arguments[2], inputs = arguments[3], groups = round_up(inputs, GROUP) / GROUP;
  memory.copy(weights, rows * inputs * sizeof(uint16_t));
  memory.share(codes, rows * groups * GROUP);
  const size_t num_scales = arguments[4] == LORASTACK_INT8 ? 1 : groups;
  memory.share(scales, rows * num_scales * sizeof(uint16_t));
  lorastack_quantise(arguments[0], weights, rows, inputs, arguments[4], codes, scales,
                     arguments[7]);
  return 0;
}

// In the order of emulated.py.
uint64_t run(const Call& call) {
  const uint64_t* const arguments = call.arguments;
  switch (call.function) {
    case 0:
      return lorastack_supports(arguments[0]);
    case 1:
      return 0;  // `run_forward` brings its own
    case 2:
      return run_forward((lorastack_model*)arguments[0], (lorastack_step*)arguments[1]);
    case 3:
      return run_logits((lorastack_lm_head*)arguments[0]);
    case 4:
      return run_propose((lorastack_proposal*)arguments[0]);
    case 5:
      return run_best(arguments);
    case 6:
      return run_top(arguments);
    case 7:
      return run_sample_rows(arguments);
    case 8:
      return run_quantise(arguments);
  }
  abort();
}

}  // namespace

int main() {
  for (;;) {
    Call call;
    receive(&call, sizeof call);
    const uint64_t result = run(call);
    send({RESULT, result, 0});
  }
}
