"""Greedy tokens of one serving engine. Run by the engine's own interpreter; it imports nothing of esparse:

    python engine.py ENGINE PROMPTS.json ANSWER.json FOLDER...

PROMPTS: token ids [prompts, length]. ANSWER: by folder, {"tokens": ids [prompts, NEW], "logprobs": [prompts, NEW], those of the
chosen tokens}, or {"refused": the engine's own sentence}. A folder that ends the process leaves {"refused": DIED}. vLLM adds
"dropped": for each MoE layer, the share of the tokens' second and further experts in whose place stands the first.
onnxruntime-genai adds "int4": the number of tokens that its int4 build of an MXFP4 folder generated.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

NEW = 64  # tokens after each prompt
DIED = "the process died"


def llama_cpp(folder: Path, prompts: list) -> list:
    """The converter's GGUF in float32, run by llama.cpp's own server. Token ids go in and come out, so every token's text is
    its number: the server does not report tokens that end within a character, nor know each way to split text."""
    sys.path[:0] = [os.environ["LLAMA_CPP"], f"{os.environ['LLAMA_CPP']}/gguf-py"]
    import gguf
    import torch
    import xllamacpp
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    vocabulary = [str(number) for number in range(json.loads((folder / "config.json").read_text())["vocab_size"])]
    kind.get_vocab_base = lambda self: (vocabulary, [gguf.TokenType.NORMAL] * len(vocabulary), "gpt-2")
    kind.set_vocab = kind._set_vocab_gpt2
    with torch.inference_mode():
        kind(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf").write()
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(folder / "model.gguf"), 256, 1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, asked = xllamacpp.Server(options), {"max_tokens": NEW, "temperature": 0, "logprobs": 1, "cache_prompt": False}
    answers = [server.handle_completions({"prompt": prompt, **asked}) for prompt in prompts]
    return [[(step["id"], step["logprob"]) for step in a["choices"][0]["logprobs"]["content"]] for a in answers]


def mlx_lm(folder: Path, prompts: list) -> list:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    steps = lambda prompt: generate_step(mx.array(prompt), model, max_tokens=NEW)  # noqa: E731
    return [[(token, logprobs[token].item()) for token, logprobs in steps(prompt)] for prompt in prompts]


def openvino(folder: Path, prompts: list) -> list:
    import torch
    from optimum.intel import OVModelForCausalLM

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, load_in_8bit=False, ov_config=exact)
    model.generation_config.eos_token_id = None
    asked = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    made = model.generate(torch.tensor(prompts), attention_mask=torch.ones_like(torch.tensor(prompts)), **asked)
    tokens, logprobs = made.sequences[:, -NEW:], torch.stack(made.logits, 1).float().log_softmax(-1)
    chosen = logprobs.gather(2, tokens[..., None])[..., 0]
    return [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), chosen.tolist(), strict=True)]


def onnxruntime_genai(folder: Path, prompts: list) -> tuple[list, dict]:
    """In float32. Where the folder's experts are in MXFP4, also the tokens of the builder's int4, which rounds them again."""
    steps, packed = _genai(folder, prompts, "fp32"), "quantization_config" in json.loads((folder / "config.json").read_text())
    return steps, {"int4": sum(map(len, _genai(folder, prompts, "int4")))} if packed else {}


def _genai(folder: Path, prompts: list, precision: str) -> list:
    import numpy
    import onnxruntime_genai
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    asked = ("", str(folder), str(folder / precision), precision, "cpu", str(folder / "cache"))
    create_model(*asked, **parse_extra_options(*asked, []))
    model, found = onnxruntime_genai.Model(str(folder / precision)), []
    for prompt in prompts:
        options, steps = onnxruntime_genai.GeneratorParams(model), []
        options.set_search_options(max_length=256, do_sample=False)
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens(numpy.array([prompt], numpy.int32))
        for _ in range(NEW):
            logits = numpy.asarray(generator.get_logits(), numpy.float64).reshape(-1)
            token = int(logits.argmax())
            steps.append((token, float(logits[token] - logits.max() - numpy.log(numpy.exp(logits - logits.max()).sum()))))
            generator.append_tokens(numpy.array([[token]], numpy.int32)) if len(steps) < NEW else None
        found.append(steps)
    return found


def vllm_cpu(folder: Path, prompts: list) -> tuple[list, dict]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    dropped = {}

    def count(model) -> None:
        for runner in (module for module in model.modules() if hasattr(module, "routed_experts")):
            runner.router.select_experts = counting(runner.router.select_experts, dropped.setdefault(runner.layer_name, []))

    def counting(select, calls: list):
        def selected(*args, **options):
            weights, experts = select(*args, **options)
            calls.append(((experts[:, 1:] == experts[:, :1]).sum().item(), weights[:, 1:].numel()))
            return weights, experts

        return selected

    model = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8)
    model.apply_model(count)  # after the run with which vLLM starts
    asked = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False)
    made = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    steps = lambda out: zip(out.token_ids, out.logprobs, strict=True)  # noqa: E731
    found = [[(token, logprobs[token].logprob) for token, logprobs in steps(request.outputs[0])] for request in made]
    shares = [sum(gone for gone, _ in calls) / sum(all for _, all in calls) for calls in dropped.values()]
    return found, {"dropped": shares} if any(shares) else {}


# By name: what runs it, and the package whose version counts.
ENGINES = {
    "llama.cpp": (llama_cpp, "xllamacpp"),
    "mlx-lm": (mlx_lm, "mlx-lm"),
    "openvino": (openvino, "openvino"),
    "onnxruntime-genai": (onnxruntime_genai, "onnxruntime-genai"),
    "vllm-cpu": (vllm_cpu, "vllm-cpu"),
}


def answer(engine: str, folder: Path, prompts: list) -> dict:
    try:
        steps = ENGINES[engine][0](folder, prompts)
        steps, more = steps if isinstance(steps, tuple) else (steps, {})
    except ImportError:  # a fault of the environment
        raise
    except Exception as error:
        said = " ".join(str(error).replace(str(folder), "FOLDER").split())
        return {"refused": f"{type(error).__name__}: {said[:300]}"}
    return {"tokens": [[t for t, _ in some] for some in steps], "logprobs": [[p for _, p in some] for some in steps], **more}


def main(engine: str, prompts: str, path: str, *folders: str) -> None:
    asked, answers = json.loads(Path(prompts).read_text()), {"version": importlib.metadata.version(ENGINES[engine][1])}
    for folder in folders:
        Path(path).write_text(json.dumps(answers | {folder: {"refused": DIED}}))
        answers[folder] = answer(engine, Path(folder), asked)
        Path(path).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
