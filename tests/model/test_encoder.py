"""Bodies and heads of bidirectional classes: the stock losses and gradients, of one document and of several packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertForPreTraining, PreTrainedModel, RobertaConfig

from kinds import MASKED, PAD, SPAN, VOCAB, tiny, with_attention
from lmssl.errors import ModelError
from lmssl.model import attention, products
from lmssl.model.encoder import MASKED_KINDS, encode, encode_decode, masked_head
from lmssl.model.head import IGNORE, loss_and_correct
from lmssl.recipe.model import FAMILIES

LENGTHS = (5, 17, 1, 9)
PADDING = 4
KINDS = sorted(MASKED_KINDS)


@pytest.fixture(params=["mask", "loop", "products"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The forms of document attention; that of the compiler without what it takes to compile."""
    monkeypatch.setattr(attention, "LOOP_FROM_TOKENS", 0 if request.param == "loop" else 10**9)
    monkeypatch.setattr(attention, "WINDOW_QUERIES", 4)  # so that a document has several blocks
    monkeypatch.setattr(products, "_compile", lambda function: function)
    if request.param == "products":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return str(request.param)


def packed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, segments, offsets and targets of one sequence of four documents and padding."""
    draws = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)
    ids, targets = (torch.randint(8, VOCAB, (1, total), generator=draws) for _ in range(2))
    targets[torch.rand((1, total), generator=draws) < 0.5] = IGNORE
    targets[0, -1] = 9
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)])[None]
    offsets = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    pad = torch.nn.functional.pad
    return (
        pad(ids, (0, PADDING), value=PAD),
        pad(segments, (0, PADDING)),
        pad(offsets, (0, PADDING)),
        pad(targets, (0, PADDING), value=IGNORE),
    )


def loss(model: PreTrainedModel, ids: Tensor, segments: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
    """Our summed loss: the head at the places of targets only."""
    places = (targets[0] != IGNORE).nonzero()[:, 0]
    hidden, head = encode(model, ids, segments, offsets)[0][places], masked_head(model)
    parts = (head.transform(hidden), head.weight_VD, head.bias_V)
    return loss_and_correct(*parts, targets[0][places], chunk_targets=8)[0]


def stock_loss(stock: PreTrainedModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Sum of the stock losses of the documents, each in a forward of its own."""
    total, start = torch.zeros(()), 0
    for length in LENGTHS:
        part = slice(start, start + length)
        count = int((targets[:, part] != IGNORE).sum())
        if count:
            total = total + stock(input_ids=ids[:, part], labels=targets[:, part]).loss * count
        start += length
    return total


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in found.values()), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_have_the_stock_losses_and_gradients(kind: str, path: str) -> None:
    model = tiny(kind)
    ids, segments, offsets, targets = packed()
    stock = tiny(kind)
    stock.set_attn_implementation("sdpa")
    wanted = stock_loss(stock, ids, targets)
    got = loss(model, ids, segments, offsets, targets)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    wanted.backward()
    got.backward()
    torch.testing.assert_close(gradients(model), gradients(stock), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", MASKED)
def test_the_compiler_sees_one_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)
    model, tensors = tiny(kind), packed()
    torch._dynamo.reset()
    with torch.no_grad():
        body = torch.compile(lambda *x: encode(model, *x), backend="eager", dynamic=False, fullgraph=True)
        torch.testing.assert_close(body(*tensors[:3]), encode(model, *tensors[:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_targets_are_those_of_the_stock_head(kind: str) -> None:
    model = tiny(kind)
    ids = torch.arange(10, 34)[None]
    head, ones = masked_head(model), torch.ones_like(ids)
    hidden = encode(model, ids, ones, torch.arange(24)[None])[0]
    logits = head.transform(hidden) @ head.weight_VD.T
    logits = logits if head.bias_V is None else logits + head.bias_V
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_document_moves_no_other(kind: str, path: str) -> None:
    model = tiny(kind)
    ids, segments, offsets, _ = packed()
    before, after = (encode(model, x, segments, offsets) for x in (ids, torch.where(segments == 2, ids - 1, ids)))
    elsewhere = (segments != 2)[0]
    assert torch.equal(before[0][elsewhere], after[0][elsewhere])
    assert not torch.allclose(before[0][~elsewhere], after[0][~elsewhere])


@pytest.mark.parametrize("kind", MASKED)
def test_dropout_in_training_keeps_documents_apart(kind: str, path: str) -> None:
    rates = {name: 0.2 for name in FAMILIES[kind].model_fields if "drop" in name}
    assert rates
    model = tiny(kind, **rates).train()
    ids, segments, offsets, targets = packed()

    def hidden(ids: Tensor) -> Tensor:
        torch.manual_seed(5)
        return encode(model, ids, segments, offsets)[0]

    before, after = hidden(ids), hidden(torch.where(segments == 2, ids - 1, ids))
    elsewhere = (segments != 2)[0]
    assert torch.equal(before[elsewhere], after[elsewhere])
    torch.manual_seed(6)
    assert not torch.equal(before, encode(model, ids, segments, offsets)[0])
    loss(model, ids, segments, offsets, targets).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_without_documents_the_sequence_is_one_and_padding_is_none(kind: str, path: str) -> None:
    model = tiny(kind)
    ids, segments, _, _ = packed()
    length = sum(LENGTHS)
    positions = torch.arange(ids.shape[1])[None]
    got = encode(model, ids, segments, positions, documents=False)[0, :length]
    model.set_attn_implementation("sdpa")
    wanted = model.base_model(input_ids=ids[:, :length]).last_hidden_state[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MASKED)
def test_rows_of_padding_stay_finite(kind: str, path: str) -> None:
    model = tiny(kind)
    ids, zeros = torch.full((2, 16), PAD), torch.zeros((2, 16), dtype=torch.int64)
    assert torch.isfinite(encode(model, ids, zeros, zeros)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weight_and_bias_are_the_models_own(kind: str) -> None:
    model = tiny(kind)
    head, parameters = masked_head(model), list(model.parameters())
    assert head.weight_VD is model.get_input_embeddings().weight
    assert head.bias_V is None or any(head.bias_V is parameter for parameter in parameters)
    assert (head.bias_V is None) == (kind == "eurobert")


def test_autocast_runs_every_path(path: str) -> None:
    for kind in MASKED:
        model = tiny(kind)
        tensors = packed()
        wanted = loss(model, *tensors).detach()
        with torch.autocast("cpu", torch.bfloat16):
            got = loss(model, *tensors)
        got.backward()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.detach(), wanted, rtol=0.05, atol=0.0)


def test_pretraining_bert_has_the_same_head() -> None:
    model = tiny("bert")
    head = masked_head(BertForPreTraining(model.config))
    assert head.weight_VD.shape == (VOCAB, 32)


def test_an_unknown_head_is_refused() -> None:
    model = tiny("bert")
    model.config.model_type = "fnet"
    with pytest.raises(ModelError, match="head of kind fnet"):
        masked_head(model)


def test_roberta_reaches_its_last_position() -> None:
    model = tiny("roberta", sequence_length=12)
    assert isinstance(model.config, RobertaConfig)
    assert model.config.max_position_embeddings == 12 + PAD + 1
    ids = torch.arange(20, 32)[None]
    encode(model, ids, torch.ones_like(ids), torch.arange(12)[None])


DECODED = (4, 6, 2, 3)


def decoder_rows() -> tuple[Tensor, Tensor]:
    """Ids and segments of what is decoded, with padding."""
    ids = torch.randint(8, VOCAB, (1, sum(DECODED)), generator=torch.Generator().manual_seed(3))
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(DECODED)])[None]
    pad = torch.nn.functional.pad
    return pad(ids, (0, 3), value=PAD), pad(segments, (0, 3))


@pytest.mark.parametrize("kind", SPAN)
def test_packed_pairs_of_documents_have_the_stock_logits_and_gradients(kind: str, path: str) -> None:
    model = tiny(kind, objective="span")
    stock = with_attention(tiny(kind, objective="span"), "eager")
    ids, segments, _, _ = packed()
    written, its_segments = decoder_rows()
    hidden = encode_decode(model, ids, segments, written, its_segments)
    logits = (hidden @ model.lm_head.weight.T)[:, : sum(DECODED)]
    wanted, start, its_start = [], 0, 0
    for length, its_length in zip(LENGTHS, DECODED, strict=True):
        read, write = ids[:, start : start + length], written[:, its_start : its_start + its_length]
        wanted.append(stock(input_ids=read, decoder_input_ids=write, use_cache=False).logits)
        start, its_start = start + length, its_start + its_length
    separate = torch.cat(wanted, dim=1)
    torch.testing.assert_close(logits, separate, rtol=1e-4, atol=2e-5)
    logits.square().mean().backward()
    separate.square().mean().backward()
    torch.testing.assert_close(gradients(model), gradients(stock), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SPAN)
def test_the_compiler_sees_one_graph_of_encoder_and_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)
    model = tiny(kind, objective="span")
    ids, segments, _, _ = packed()
    tensors = (ids, segments, *decoder_rows())
    torch._dynamo.reset()
    with torch.no_grad():
        both = torch.compile(lambda *x: encode_decode(model, *x), backend="eager", dynamic=False, fullgraph=True)
        torch.testing.assert_close(both(*tensors), encode_decode(model, *tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SPAN)
@pytest.mark.parametrize("dropout_rate", [0.0, 0.2])
def test_a_changed_pair_moves_no_other(kind: str, dropout_rate: float, path: str) -> None:
    model = tiny(kind, objective="span", dropout_rate=dropout_rate).train()
    ids, segments, _, _ = packed()
    written, its_segments = decoder_rows()

    def hidden(ids: Tensor, written: Tensor) -> Tensor:
        torch.manual_seed(5)
        return encode_decode(model, ids, segments, written, its_segments)[0]

    before = hidden(ids, written)
    elsewhere = (its_segments != 2)[0]
    changed = (torch.where(segments == 2, ids - 1, ids), torch.where(its_segments == 2, written - 1, written))
    for read, write in ((changed[0], written), (ids, changed[1])):  # the encoder's document, the decoder's
        after = hidden(read, write)
        assert torch.equal(before[elsewhere], after[elsewhere])
        assert not torch.allclose(before[~elsewhere], after[~elsewhere])


@pytest.mark.parametrize("kind", SPAN)
def test_a_decoder_document_without_an_encoders_stays_finite(kind: str, path: str) -> None:
    model = tiny(kind, objective="span")
    ids, segments, _, _ = packed()
    written, its_segments = decoder_rows()
    hidden = encode_decode(model, ids, segments, written, torch.where(its_segments == 2, 9, its_segments))
    hidden.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
