#!/usr/bin/env bash
# Guessed: lm-eval's Hugging Face model runs the context of a multiple-choice
# item once for all choices. It groups requests by context and keeps logits for
# that (logits_cache, on by default).
#
# The case (lm-eval 0.4.13, transformers 5.23.0, torch 2.13.0, 2026-11-30): it
# does so only where every choice has one token. With two tokens a choice the
# whole context runs again for each of them, so four choices cost four contexts.
#
# Output seen:
#   context of 50 tokens, 4 choices of 1 token: 50 tokens run
#   context of 50 tokens, 4 choices of 2 tokens: 204 tokens run
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0 "lm-eval[hf]==0.4.13"
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1
venv/bin/python - <<'PYTHON' 2> "$folder/stderr" || { cat "$folder/stderr" >&2; exit 1; }
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")

torch.manual_seed(0)
shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=63, max_position_embeddings=128, **shape)).eval()
run = []
model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: run.append(inputs[0].numel()))

harness, context = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), " ".join(WORDS[:50])
seen = []
for length in (1, 2):
    choices = [" " + " ".join([word, "w59"][:length]) for word in WORDS[50:54]]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(context, choice), idx=i) for i, choice in enumerate(choices)
    ]
    run.clear()
    harness.loglikelihood(requests, disable_tqdm=True)
    seen.append(sum(run))
    print(f"context of 50 tokens, 4 choices of {length} token{'s' * (length > 1)}: {sum(run)} tokens run")
assert seen == [50, 4 * 51], seen
PYTHON
