// One block of a DeepSeek-V4 draft module in llama.cpp (b11434): the logits of its slots.
// block MODEL FEATURES ROWS WIDTH ANCHOR MASK SLOTS OUT
#include "common.h"
#include "llama.h"
#include "src/llama-ext.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int, char ** argv) {
    const int rows = atoi(argv[3]), width = atoi(argv[4]), slots = atoi(argv[7]);
    std::vector<float> features((size_t) rows * width);
    FILE * in = fopen(argv[2], "rb");
    if (fread(features.data(), 4, features.size(), in) != features.size()) return 2;
    auto * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 3;
    auto params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = 256;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.swa_full = true;
    auto * ctx = llama_init_from_model(model, params);
    if (!ctx) return 4;
    llama_set_embeddings_nextn(ctx, true, true);
    llama_set_causal_attn(ctx, false);
    common_batch context(ctx), block(ctx);
    for (int i = 0; i < rows; ++i) {
        const llama_pos at[4] = { i, i, i, 0 };
        context.add_embd({ features.data() + (size_t) i * width, 1, (size_t) width }, at, 0, false);
    }
    if (llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, context.get())) return 5;
    for (int i = 0; i < slots; ++i) {
        block.add(i ? atoi(argv[6]) : atoi(argv[5]), rows + i, 0, true);
    }
    if (llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, block.get())) return 6;
    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    FILE * out = fopen(argv[8], "wb");
    for (int i = 0; i < slots; ++i) {
        fwrite(llama_get_logits_ith(ctx, i), 4, vocab, out);
    }
    fclose(out);
    return 0;
}
