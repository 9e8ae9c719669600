"""One pass over a calibration set, in which each layer's experts run once and only their Gram is kept."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files import digest
from ..machine import free_memory
from ..moe.experts import Scratch, pair_outputs, weighted_sum
from ..moe.gates import all_logits, unpack
from ..moe.identity import gate_digest
from ..moe.layers import MoELayer, decoder_layers, experts_returning, flat_output, moe_layers, replaced_experts
from ..moe.routers import table_ranking
from ..moe.running import check_tokens, check_unquantised, evaluating, input_device, temporarily, uncompiled
from .reach import lost_of_each_group, reach, within_reach
from .trace import LayerTrace, Trace, check_experts

CHUNK_TOKENS = 2048


class Recorder:
    """Replaces a layer's experts during tracing: it runs the experts within reach, keeps their Gram, and returns the layer's
    own result from the same outputs.

    tokens: how many all calls bring at most. Recorders that run one after the other share `scratch`. In a progressive trace,
    `target` is z [tokens, d] for the next call.
    """

    def __init__(self, layer: MoELayer, tokens: int, keep: int | None, chunk: int | None, scratch: Scratch):
        self.layer, self.tokens, self.chunk, self.scratch = layer, tokens, chunk, scratch
        self.stock = layer.experts.config._experts_implementation
        _ = layer.output_map  # Probe now: later the hooks would record it.
        self.keep, self.m = keep or layer.k, reach(layer.n, layer.k, keep, layer.router)  # m: at most
        self.gram: Tensor | None = None  # for all tokens, from the first call on
        self.done = 0  # tokens whose Gram is in it
        self.recorded: dict[str, list[Tensor]] = defaultdict(list)  # the trace's other tensors, in parts
        self.weights: list[Tensor] = []  # the gate's own
        self.target: Tensor | None = None
        self.paused = False

    def route(self, gate, inputs, output) -> None:
        """Forward hook of the gate: records the logits and the experts within reach, the chosen ones first."""
        if self.paused:
            return
        router, k, (logits, weights, chosen) = self.layer.router, self.layer.k, unpack(output)
        logits = all_logits(router, gate, inputs, logits)
        removed = torch.zeros_like(logits[0], dtype=torch.bool)
        if not logits.isfinite().all():
            removed = (logits == float("-inf")).all(0)  # by `masked`
            if not logits.isfinite().logical_or(removed).all():
                raise ValueError(
                    f"{self.layer.name}: router logits are not finite; the model or its dtype overflows on this text."
                )
        further = self.m > k + (router.shared > 0)
        if further or router.idle or not router.sorted:
            ranking = table_ranking(chosen, self.layer.n) if router.table else router.ranking(logits)
            ranking = ranking.masked_fill(removed, float("-inf")) if router.table else ranking
        if router.idle:  # for no expert, the gate returns some expert with weight 0
            chosen = ranking.topk(k).indices
        strength = weights if router.sorted else ranking.gather(1, chosen)
        self.sorting = strength.argsort(dim=1, descending=True, stable=True)
        chosen = chosen.gather(1, self.sorting)
        rest = self._others(router.ungrouped(logits) if router.groups > 1 else ranking, chosen) if further else chosen[:, :0]
        shared = [torch.full_like(chosen[:, :1], self.layer.n)] if router.shared else []
        self.shared_weight = output[3].sum(1) if router.shared else None
        self.weights.append(weights.gather(1, self.sorting))
        self.recorded["logits"].append(logits)
        self.recorded["order"].append(torch.cat([chosen, rest, *shared], 1))

    def _others(self, ranking: Tensor, chosen: Tensor) -> Tensor:
        """The experts within reach beside the chosen ones, best first, [tokens, m - k]; n where a token reaches fewer."""
        n, k, router = self.layer.n, self.layer.k, self.layer.router
        if router.groups > 1 and router.ranks_within_groups:
            lost = lost_of_each_group(n, k, self.keep, router)
            inside = [within_reach(part, k, lost, router) for part in ranking.split(CHUNK_TOKENS)]
            ranking = ranking.masked_fill(~torch.cat(inside), float("-inf"))
        best = ranking.scatter(1, chosen, float("inf")).topk(self.m - (router.shared > 0))
        others = best.indices[:, k:]
        if router.groups > 1 and not router.extra_logits:
            others = others.masked_fill(best.values[:, k:] == float("-inf"), n)
        return others

    def pass_stream(self, before: Tensor | None, after: Tensor) -> None:
        """Records the squared norm of the residual stream [sequences, length, d] behind the decoder layer, and its cosine with
        the stream before the block, if that is known. Parallel streams (DeepSeek-V4: [sequences, length, streams, d]) count
        together."""
        after = after.flatten(2).flatten(0, 1).to(torch.promote_types(after.dtype, torch.float32))
        norm = torch.linalg.vector_norm(after, dim=1)
        self.recorded["stream_norm"].append(norm.square())
        if before is not None:
            before = before.flatten(2).flatten(0, 1).to(after.dtype)
            both = (torch.linalg.vector_norm(before, dim=1) * norm).clamp(min=torch.finfo(norm.dtype).tiny)
            self.recorded["stream_cosine"].append((before * after).sum(1) / both)

    def __call__(self, _experts, hidden_states: Tensor, _index, weights: Tensor) -> Tensor:
        """[tokens, d] -> [tokens, d], for one chunk of tokens at a time; a chunk that does not fit into memory is halved."""
        results = []
        weights = weights.gather(1, self.sorting)  # as in `order`
        ranks = self.sorting.argsort(1)  # the place in `order` of the router's first, second, ... choice
        shared = self._shared_output(hidden_states) if self.layer.router.shared else None
        self.chunk = self.chunk or chunk_size(self.layer, self.m, hidden_states)
        start, first = 0, self.done
        while start < len(hidden_states):
            part = slice(start, start + self.chunk)
            tensors = (hidden_states, self.recorded["order"][-1], weights, ranks, self.target, shared)
            try:
                results.append(self._run(*(tensor if tensor is None else tensor[part] for tensor in tensors)))
                start = part.stop
                continue
            except (MemoryError, RuntimeError) as error:
                # CUDA raises a typed error; the CPU allocator only a message.
                full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if not full or self.chunk == 1:
                    raise
            self.chunk //= 2  # outside the except clause, where the error no longer holds tensors
            self.scratch.held.clear()
            if hidden_states.is_cuda:
                torch.cuda.empty_cache()
        if not torch.stack(self.gram[first : self.done].aminmax()).isfinite().all():
            raise ValueError(
                f"{self.layer.name}: expert outputs are not finite; the model or its dtype overflows on this text."
            )
        return results[0] if len(results) == 1 else torch.cat(results)

    def _shared_output(self, hidden_states: Tensor) -> Tensor:
        """The output [tokens, d] of the shared experts, divided by the weight that the router gave them together."""
        with temporarily([self], "paused", True), experts_returning(self.layer):
            output = flat_output(self.layer.block(hidden_states[None]))
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        return wide / self.shared_weight[:, None].to(wide.dtype).clamp(min=torch.finfo(torch.float32).tiny)

    def _run(self, hidden_states, order, weights, ranks, target, shared) -> Tensor:
        """The layer's own result [chunk, d]. Keeps the Gram at the end, so that a failed chunk leaves nothing."""
        k, output_map = self.layer.k, self.layer.output_map
        outputs = pair_outputs(self.layer.experts, hidden_states, order, self.scratch)  # [chunk, m, inner]
        result = weighted_sum(outputs[:, :k], order[:, :k], weights, ranks, self.stock)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if output_map is not None:  # from here on [chunk, m, d]: contributions to the block's output
            output_map = output_map.to(outputs.dtype)
            outputs = outputs @ output_map if output_map.ndim else outputs * output_map
        if shared is not None:
            outputs[:, -1] = shared
        i, j = torch.triu_indices(self.m, self.m, device=outputs.device)
        products = self.scratch.empty("products", outputs, len(outputs), self.m, self.m)
        torch.bmm(outputs, outputs.mT, out=products)
        if self.gram is None:
            self.gram = outputs.new_empty(self.tokens, len(i))
        done = self.done + len(outputs)
        torch.index_select(products.flatten(1), 1, i * self.m + j, out=self.gram[self.done : done])
        if target is not None:
            target = target.to(outputs.dtype)
            dot, norm = (outputs @ target[:, :, None])[:, :, 0], target.double().square().sum(1)
            self.recorded["target_dot"].append(dot)
            self.recorded["target_norm"].append(norm)
        self.done = done
        return result

    def finish(self, length: int | None = None) -> LayerTrace:
        """The trace of all calls so far; length: tokens of a sequence, if the calls hold whole sequences."""
        tensors = {name: torch.cat(recorded) for name, recorded in self.recorded.items()} | {"gram": self.gram[: self.done]}
        traced = LayerTrace(self.layer.name, self.layer.k, self.layer.router, keep=self.keep, length=length, **tensors)
        if not self.layer.router.idle:
            traced.__dict__["weights"] = torch.cat(self.weights)  # so that nobody computes them again
        return traced


def chunk_size(layer: MoELayer, m: int, like: Tensor) -> int:
    """How many tokens' expert outputs fit into a quarter of the free memory; more than a few thousand gain nothing."""
    inner = layer.experts.down_proj[0].numel() // like.shape[1]
    each = m * ((3 * inner + 3 * like.shape[1]) * like.element_size() + 8 * like.shape[1])  # bytes a token
    most = 8 * CHUNK_TOKENS if like.is_cuda else CHUNK_TOKENS
    return int(min(most, max(1, free_memory(like.device) / 4 / each)))


@contextmanager
def recording_stream(recorder: Recorder, decoder: nn.Module) -> Iterator[None]:
    """Puts hooks on a decoder layer that record the residual stream. The stream before the block is the input of the norm whose
    output the gate takes."""
    entered: dict[int, tuple[Tensor, Tensor]] = {}  # input and output by the output's address, which no other tensor takes over
    before: list[Tensor | None] = []

    def enter(_module, inputs, output) -> None:
        if inputs and torch.is_tensor(inputs[0]) and torch.is_tensor(output) and inputs[0].shape == output.shape:
            entered[output.data_ptr()] = inputs[0], output

    def at_gate(_gate, inputs, _output) -> None:
        before[:] = [entered.get(inputs[0].data_ptr(), (None,))[0]]

    def leave(_decoder, _inputs, output) -> None:
        entering, after = before.pop(), output[0] if isinstance(output, tuple) else output
        same = entering is not None and entering.shape == after.shape
        recorder.pass_stream(entering if same else None, after)
        entered.clear()

    with ExitStack() as stack:
        for module in decoder.children():
            stack.enter_context(module.register_forward_hook(enter))
        stack.enter_context(recorder.layer.gate.register_forward_hook(at_gate))
        stack.enter_context(decoder.register_forward_hook(leave))
        yield


@contextmanager
def recording(recorders: Sequence[Recorder], decoders: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Puts recorders in place of their layers' experts, and their hooks on the gates and on the decoder layers, if given."""
    layers = [recorder.layer for recorder in recorders]
    holders = {module: decoder for decoder in decoders for module in decoder.modules()}
    with ExitStack() as stack, uncompiled(), replaced_experts(layers, recorders):
        for recorder in recorders:
            stack.enter_context(recorder.layer.gate.register_forward_hook(recorder.route))
            if recorder.layer.experts in holders:
                stack.enter_context(recording_stream(recorder, holders[recorder.layer.experts]))
        yield


def tokens_digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def check_gram(layers: Sequence[MoELayer], tokens: int, keep: int | None, device: torch.device) -> None:
    """ValueError unless the Gram matrices of these layers on so many tokens fit into the free memory."""
    entries = [(m := reach(layer.n, layer.k, keep, layer.router)) * (m + 1) // 2 for layer in layers]
    size, free = 4 * tokens * sum(entries), free_memory(device)
    if size > free:
        raise ValueError(
            f"The Gram of {len(layers)} layers and {tokens} tokens would take {size / 1e9:.2g} GB where {free / 1e9:.2g} "
            "are free: use fewer sequences, keep more experts, or trace from disk, where one layer is held."
        )


@torch.no_grad()
def trace(model, tokens: Tensor, *, keep: int | None = None, batch_size: int = 8, chunk_tokens: int | None = None) -> Trace:
    """Run the model over a calibration set once and record the logits and Grams for Eq. 3, betas and frequencies.

        tokens = esparse.calibration_tokens("web", tokenizer, sequences=64, length=256)
        plan = esparse.search_experts(esparse.trace(model, tokens), 6)

    tokens: [sequences, length] ids. keep: the smallest number of kept experts whose losses the trace tells (None: k); a larger
    one runs fewer experts. With all n, a token's chosen experts alone run, as in the model's own pass: enough for the scores,
    frequencies and betas of any number of kept experts. batch_size: sequences per forward pass. chunk_tokens: tokens whose
    expert outputs are in memory at a time (None: as many as fit). The trace lies on the model's device. The model runs in
    evaluation mode and is unchanged afterwards. In half precision, outputs are added as in a stock forward pass. Stock
    generation runs token by token and still routes up to 1% of the tokens differently (bfloat16, tiny model, CPU).
    Raises ValueError for models without MoE layers or with quantised experts, token ids outside the vocabulary, keep outside
    k..n, and logits or outputs that are not finite.
    """
    check_tokens(model, tokens)
    layers = moe_layers(model)
    check_unquantised(layer.experts for layer in layers)
    for layer in layers:
        check_experts(layer.k if keep is None else keep, layer.n, layer.k)
    check_gram(layers, tokens.numel(), keep, input_device(model))
    scratch = Scratch()
    recorders = [Recorder(layer, tokens.numel(), keep, chunk_tokens, scratch) for layer in layers]
    with evaluating(model), recording(recorders, decoder_layers(model)):
        for batch in tqdm(tokens.split(batch_size), desc="trace", unit="batch"):
            model.base_model(batch.to(input_device(model)), use_cache=False)
    model_digest = digest([gate_digest(layer) for layer in layers])
    return Trace([recorder.finish(tokens.shape[1]) for recorder in recorders], model_digest, tokens_digest(tokens))


@torch.no_grad()
def trace_block(layer: MoELayer, hidden_states: Tensor, keep: int | None, scratch: Scratch | None = None) -> LayerTrace:
    """The trace of one block alone, on hidden states [tokens, d]."""
    recorder = Recorder(layer, len(hidden_states), keep, None, scratch or Scratch())
    with evaluating(layer.block), recording([recorder]):
        layer.block(hidden_states[None])
    return recorder.finish()
