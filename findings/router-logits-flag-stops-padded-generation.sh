#!/usr/bin/env bash
# Guessed: output_router_logits=True in the config of a Mixtral matters to
# training only, where it adds the balance loss; generate gives the same tokens
# with it, padded batch or not.
#
# The case (transformers 5.23.0, torch 2.13.0, 2026-11-28): generate works for
# a batch without padding and raises for a left-padded one, at its second new
# token. The model computes the balance loss in every forward pass, labels or
# not, and weighs the rows of router logits by the attention mask; with a cache
# the rows are those of the one new token, the mask that of the whole text. A
# batch without padding escapes because generate drops a mask that is all ones:
# the same step called by hand with such a mask raises too. With use_cache=False
# the padded batch works.
#
# Output seen:
#   flag off, no padding: as expected
#   flag off, padded: as expected
#   flag on, no padding: as expected
#   flag on, padded, one new token: as expected
#   flag on, padded, no cache: as expected
#   flag on, padded: RuntimeError: The size of tensor a (2) must match the size of tensor b (14) at non-singleton dimension 0
#   flag on, no padding, cached step by hand: RuntimeError: The size of tensor a (2) must match the size of tensor b (14) at non-singleton dimension 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 transformers==5.23.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PYTHON'
import torch
from transformers import MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
model = MixtralForCausalLM(MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=None,
)).eval()
tokens = torch.randint(3, 64, (2, 6))
ones = torch.ones_like(tokens)
padded = ones.clone()
padded[0, :2] = 0  # the first text is two tokens shorter, padded on the left


def generate(mask, count=3, **options):
    return model.generate(tokens, attention_mask=mask, max_new_tokens=count,
                          do_sample=False, pad_token_id=0, **options)


def report(case, flag, expected, action):
    model.config.output_router_logits = flag
    got = action()
    assert torch.equal(got, expected), (case, got, expected)
    print(f"{case}: as expected")


def report_raise(case, action):
    model.config.output_router_logits = True
    try:
        action()
    except RuntimeError as error:
        # 2 rows of router logits, 2 texts of 7 tokens in the mask
        assert "tensor a (2)" in str(error) and "tensor b (14)" in str(error), error
        print(f"{case}: RuntimeError: {error}")
    else:
        raise AssertionError(f"{case}: did not raise")


with torch.no_grad():
    model.config.output_router_logits = False
    plain = generate(ones, use_cache=False)
    short = generate(padded, use_cache=False)
    report("flag off, no padding", False, plain, lambda: generate(ones))
    report("flag off, padded", False, short, lambda: generate(padded))
    report("flag on, no padding", True, plain, lambda: generate(ones))
    report("flag on, padded, one new token", True, short[:, :7], lambda: generate(padded, 1))
    report("flag on, padded, no cache", True, short, lambda: generate(padded, use_cache=False))
    report_raise("flag on, padded", lambda: generate(padded))
    cache = model(tokens, attention_mask=ones).past_key_values
    report_raise("flag on, no padding, cached step by hand", lambda: model(
        plain[:, 6:7], attention_mask=torch.ones_like(plain[:, :7]), past_key_values=cache))
PYTHON
