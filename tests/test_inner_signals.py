"""What is learnt from inside a teacher: the field's own formulas, on every layout, and no part of what is exported."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertConfig,
    MptConfig,
    NanoChatConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
    T5Config,
)

from datamodules.text import Text
from lightning_modules.activations import Activations, Heads
from lightning_modules.distillation import CausalDistillation, DenoisingDistillation, MaskedDistillation
from lightning_modules.inner_signals import (
    InnerLoss,
    InnerSignals,
    attention_distance,
    even_map,
    most_heads,
    relation_kl,
    relative_distance,
    seen_by,
)
from lightning_modules.losses import IGNORED
from lightning_modules.lstm import LSTMConfig
from lightning_modules.student import NARROWED, PartOfTeacher, axes_of_width, principal_directions
from tests.distilling import as_command, fit, flags_of, opened, refused, started
from tests.faults import signal_at, state

ALL = InnerSignals(hidden=1.0, embeddings=1.0, cosine=1.0, attention=1.0, relations=1.0, kinds=("qk", "qq", "kk", "vv"))
LAYOUTS = {
    "llama": (AutoModelForCausalLM, LlamaConfig(num_key_value_heads=2, head_dim=8)),
    "qwen3": (AutoModelForCausalLM, Qwen3Config(num_key_value_heads=2, head_dim=12)),
    "phi3": (AutoModelForCausalLM, Phi3Config(num_key_value_heads=2, pad_token_id=0)),
    "gpt2": (AutoModelForCausalLM, GPT2Config()),
    "gpt_neox": (AutoModelForCausalLM, GPTNeoXConfig()),
    "bloom": (AutoModelForCausalLM, BloomConfig()),
    "gpt_bigcode": (AutoModelForCausalLM, GPTBigCodeConfig(multi_query=False)),
    "mpt": (AutoModelForCausalLM, MptConfig()),
    "bert": (AutoModelForMaskedLM, BertConfig()),
    "distilbert": (AutoModelForMaskedLM, DistilBertConfig(dim=32, hidden_dim=64, n_layers=3, n_heads=4)),
    "deberta": (AutoModelForMaskedLM, DebertaV2Config(relative_attention=True, pos_att_type=["c2p", "p2c"])),
    "modernbert": (AutoModelForMaskedLM, ModernBertConfig(pad_token_id=0)),
    "bart": (AutoModelForSeq2SeqLM, BartConfig(d_model=32, encoder_layers=3, decoder_layers=3)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(d_kv=8, num_decoder_layers=3)),
}


def network(name: str):
    auto_class, config = LAYOUTS[name]
    config.vocab_size = 40
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    for field, value in sizes.items():
        setattr(config, config.attribute_map.get(field, field), value)
    torch.manual_seed(0)
    return auto_class.from_config(config).eval()


def read(model, ids: torch.Tensor):
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_taken_is_what_transformers_itself_gives(name):
    model, ids = network(name), torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0))
    activations = Activations(model)
    found = model(
        ids, output_hidden_states=True, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    )
    with activations.taken() as stacks:
        read(model, ids)
        for key, stack in stacks.items():
            theirs = found["hidden_states" if key == "layers" else f"{key}_hidden_states"]
            assert stack.depth == 3 and sorted(stack.hidden) == [0, 1, 2, 3] and sorted(stack.heads) == [0, 1, 2]
            for place in range(3):  # the last one of transformers is behind the last norm
                torch.testing.assert_close(stack.hidden[place], theirs[place], rtol=0, atol=1e-6)
            size = {"t5": 8, "qwen3": 12}.get(name, 8)
            shared = 2 if name in ("llama", "qwen3", "phi3") else 4
            widths = [part.shape[-1] for part in stack.heads[1][:3]]
            assert widths == [4 * size, shared * size, shared * size] and stack.heads[1].size == size
    assert not any(stack.hidden or stack.heads for stack in activations.stacks.values())
    read(model, ids)
    assert not any(stack.hidden or stack.heads for stack in activations.stacks.values())


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_bigcode"])
def test_the_relation_of_queries_and_keys_is_attention(name):
    """transformers' own probabilities, where no rotary positions come between."""
    model, ids = network(name), torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation("eager")
    probabilities = read_attentions(model, ids)
    activations = Activations(model)
    with activations.taken() as stacks:
        read(model, ids)
        heads = stacks["layers"].heads[1]
    other = Heads(*(torch.zeros_like(part) for part in heads[:3]), heads.size)  # attends to all alike
    pairs = torch.ones(2, 7, 7, dtype=torch.bool)
    pairs = pairs if name == "bert" else pairs.tril()
    kl_BT = relation_kl("qk", other, heads, 4, pairs)
    p_BATT = probabilities[1]
    uniform = pairs / pairs.sum(-1, keepdim=True)
    expected_BT = torch.special.xlogy(p_BATT, p_BATT / uniform[:, None]).nan_to_num(0).sum(-1).mean(1)
    torch.testing.assert_close(kl_BT, expected_BT, rtol=0, atol=1e-5)


def read_attentions(model, ids):
    return model(ids, output_attentions=True).attentions


def test_heads_of_both_models_are_divided_alike():
    torch.manual_seed(0)
    student = Heads(torch.randn(2, 5, 24), torch.randn(2, 5, 12), torch.randn(2, 5, 12), 6)
    teacher = Heads(torch.randn(2, 5, 32), torch.randn(2, 5, 16), torch.randn(2, 5, 16), 8)
    pairs = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    for kind in ("qk", "qq", "kk", "vv"):
        for heads in (None, 1, 2, 4):
            assert (relation_kl(kind, student, teacher, heads, pairs) >= 0).all()
            assert relation_kl(kind, teacher, teacher, heads, pairs).abs().max() < 1e-6
    assert most_heads([24, 32], 4) == 4 and most_heads([24, 32], 12) == 8 and most_heads([25, 32], 4) == 1
    with pytest.raises(ValueError, match="does not divide"):
        relation_kl("qq", student, teacher, 3, pairs)
    # Keys that two heads share are each of them's.
    wide = Heads(teacher.queries_BTW, teacher.keys_BTW.unflatten(-1, (2, 8)).repeat_interleave(2, 2).flatten(2), *[
        teacher.values_BTW
    ], 8)  # fmt: skip
    apart = attention_distance(wide, teacher, 4, pairs)
    assert apart.abs().max() < 1e-10 and attention_distance(student, teacher, None, pairs).min() > 0


def test_a_distance_is_relative_to_the_teacher():
    teacher = torch.randn(2, 3, 8)
    torch.testing.assert_close(relative_distance(torch.zeros(2, 3, 8), 5 * teacher), torch.ones(2, 3))
    torch.testing.assert_close(relative_distance(2 * teacher, teacher), torch.ones(2, 3))
    assert relative_distance(teacher, teacher).max() == 0


def test_layers_are_mapped_evenly_the_last_to_the_last():
    assert even_map(3, 6) == [1, 3, 5] and even_map(2, 3) == [1, 2] and even_map(4, 4) == [0, 1, 2, 3]
    assert even_map(1, 12) == [11] and even_map(4, 2) == [0, 0, 1, 1]


def test_padding_other_documents_and_the_future_are_not_seen():
    real = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    seen = seen_by(real, torch.tensor([2]), True, torch.tensor([[0, 1, 0, 1, 2]]))
    assert seen.pairs_BTT[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
    ]
    assert seen.weights_BT.tolist() == [[0.5, 0.5, 0.5, 0.5, 0.0]]  # two labels, evenly over four tokens
    assert seen_by(real, torch.tensor([1]), False).pairs_BTT[0, 0].int().tolist() == [1, 1, 1, 1, 0]


# In training


@pytest.mark.parametrize("kind", ["causal", "masked", "denoising"])
def test_a_student_like_its_teacher_has_nothing_to_learn_inside(kind, texts, decoder, encoder, denoiser):
    teacher, module = {
        "causal": (decoder, CausalDistillation),
        "masked": (encoder, MaskedDistillation),
        "denoising": (denoiser, DenoisingDistillation),
    }[kind]
    same, batch = opened(texts, teacher, module, student=PartOfTeacher([0, 1]), inner=ALL)
    same.network.eval()
    same.teachers[0].network.float()
    *_, count, divergence, inner = same.training_loss(batch, 1.0)
    assert int(count) > 0 and float(inner) < 1e-3 * int(count)  # bf16 weights
    assert not list(same.inner_loss.parameters())  # of equal widths there is nothing to project
    other, _ = opened(texts, teacher, module, student=PartOfTeacher([1, 0]), inner=ALL)
    other.network.eval()
    other.teachers[0].network.float()
    assert float(other.training_loss(batch, 1.0)[4]) > 1e-2 * int(count)


def test_each_signal_adds_its_weighted_sum_to_the_objective(texts, decoder):
    plain, batch = opened(texts, decoder)
    base = float(plain.training_loss(batch, 2.0)[0])
    total = 0.0
    for name in ("hidden", "embeddings", "cosine", "attention", "relations"):
        one, _ = opened(texts, decoder, inner=InnerSignals(**{name: 1.0}))
        objective, *_, inner = one.training_loss(batch, 2.0)
        double, _ = opened(texts, decoder, inner=InnerSignals(**{name: 2.0}))
        assert float(inner) > 0 and float(double.training_loss(batch, 2.0)[4]) == pytest.approx(
            2 * float(inner), rel=1e-4
        )
        assert float(objective) == pytest.approx(base + float(inner) / 2, rel=1e-5), name
        total += float(inner)
    assert total > 0


def test_projections_are_trained_beside_the_student(texts, decoder):
    module, _ = opened(texts, decoder, inner=ALL)
    trained = {id(p) for group in module.trained_groups() for p in group["params"]}
    assert {id(p) for p in module.parameters()} == trained and list(module.inner_loss.parameters())


def test_a_row_without_labels_and_padding_add_nothing(texts, decoder):
    module, batch = opened(texts, decoder, inner=ALL)
    module.network.eval()
    batch["labels"][1] = IGNORED
    batch["labels"][2, 20:] = IGNORED
    before = float(module.training_loss(batch, 1.0)[4])
    batch["input_ids"][1] = 5
    batch["input_ids"][2, 20:] = 7
    assert float(module.training_loss(batch, 1.0)[4]) == pytest.approx(before, rel=1e-5)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    assert sum(float(module.training_loss(row, 1.0)[4]) for row in rows) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("cross_document_attention", [True, False])
def test_the_filling_of_the_last_row_adds_nothing(cross_document_attention, texts, encoder):
    settings = {"seq_len": 32, "batch_size": 4, "val_fraction": 0.2, "objective": "masked"}
    data = Text(path=str(texts), cross_document_attention=cross_document_attention, **settings)
    student = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    module, batch = started(MaskedDistillation(teacher=str(encoder), student=student, inner=ALL), data)
    last = data.train_rows.__getitems__(np.array([[0], [len(data.train_rows) - 1]]))
    text = len(data.store.train) % 32
    assert 0 < text < 32
    weights_T = module.seen(last)["layers"].weights_BT[0]
    assert (weights_T[:text] > 0).all() and (weights_T[text:] == 0).all()
    assert float(weights_T.sum()) == pytest.approx(int((last["labels"] != IGNORED).sum()))


def test_first_the_inside_alone_then_the_outputs_alone(texts, decoder):
    module, batch = opened(texts, decoder, inner=InnerSignals(hidden=1.0, first=0.5))
    objective, *_, inner = module.training_loss(batch, 1.0)
    assert float(objective) == pytest.approx(float(inner), rel=1e-5)
    objective.backward()
    assert not module.network.get_output_embeddings().weight.grad.any()
    assert module.network.model.layers[0].mlp.up_proj.weight.grad.any()
    loop = module.trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 6
    module.zero_grad()
    objective, _, count, divergence, inner = module.training_loss(batch, 1.0)
    assert float(inner) == 0 and float(objective) == pytest.approx(float(divergence), rel=1e-5)
    objective.backward()
    assert module.network.get_output_embeddings().weight.grad.any()
    assert all(not p.grad.any() for p in module.inner_loss.parameters())  # there for DDP, and zero


INNER = {"model.inner.hidden": 1, "model.inner.relations": 1, "comparison.control": False, "ckpt_path": "last"}


def test_projections_learn_and_resume_and_are_not_exported(texts, decoder, tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        flags = flags_of(tmp_path / name, texts, decoder, **INNER)
        if name == "cut":
            assert as_command(tmp_path / name, [*flags, *signal_at(7)]) == 143
        assert as_command(tmp_path / name, flags) == 0
    assert state(tmp_path / "whole") == state(tmp_path / "cut")
    checkpoint = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    projections = [name for name in checkpoint if "projections" in name]
    assert len(projections) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    exported = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert not any("projection" in name for name in exported)
    assert model.config.hidden_size == 16
    assert "train/inner" in (tmp_path / "whole" / "metrics.csv").read_text().splitlines()[0]


def test_the_inside_on_two_ranks_is_that_of_two_micro_batches(texts, decoder, tmp_path):
    one = {"trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 12, "model.inner.first": 0.5}
    fit(tmp_path / "one", texts, decoder, **INNER, **one)
    (tmp_path / "two").mkdir()
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "model.inner.first": 0.5}
    assert as_command(tmp_path / "two", flags_of(tmp_path / "two", texts, decoder, **INNER, **two)) == 0
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)


def test_a_run_goes_on_with_the_signals_it_began_with(texts, decoder, tmp_path, capsys):
    quick = {"trainer.max_steps": 2, "trainer.val_check_interval": 2}
    fit(tmp_path, texts, decoder, **INNER, **quick)
    flags = flags_of(tmp_path, texts, decoder, **(INNER | {"trainer.max_steps": 4, "model.inner.hidden": 2}))
    assert "the checkpoint has inner" in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model.inner.hidden": 1, "model.inner.layer_map": "[2]"}, "names layer 2; the teacher has 0 to 1"),
        ({"model.inner.hidden": 1, "model.inner.layer_map": "[0,1]"}, "has 2 numbers; the student has 1 layers"),
        ({"model.inner.relations": 1, "model.inner.relation_layer": 5}, "relation_layer is 5"),
        ({"model.inner.relations": 1, "model.inner.relation_heads": 3}, "does not divide"),
        ({"model.inner.relations": 1, "model.inner.relation_heads": -1}, "relation_heads is -1"),
        ({"model.inner.hidden": 0}, "one or more above zero"),
        ({"model.inner.hidden": 1, "model.inner.first": 1.0}, "pass a part of the run"),
        ({"model.inner.hidden": 1, "model.compile": True}, "leave one out"),
    ],
)
def test_what_cannot_be_compared_is_one_line(flags, told, texts, decoder, tmp_path, capsys):
    assert told in refused(capsys, *flags_of(tmp_path, texts, decoder, **flags))
    assert not (tmp_path / "checkpoints").exists()


def test_a_network_without_known_layers_is_refused(texts, decoder):
    with pytest.raises(ValueError, match="not known by name; leave --model.inner out"):
        opened(texts, decoder, student=LSTMConfig(hidden_size=8), inner=InnerSignals(hidden=1.0))


def test_layers_without_attention_have_hidden_states_alone(texts, decoder):
    student = MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=1)
    module, batch = opened(texts, decoder, student=student, inner=InnerSignals(hidden=1.0))
    assert float(module.training_loss(batch, 1.0)[-1]) > 0
    with pytest.raises(ValueError, match="do not know the queries, keys and values of layer 0 of MambaConfig"):
        opened(texts, decoder, student=student, inner=InnerSignals(relations=1.0))


def test_an_encoder_decoder_is_compared_with_its_like_alone():
    student, teacher = network("bart"), network("bert")
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        InnerLoss(InnerSignals(hidden=1.0), student, teacher)


# A narrower student that begins along the teacher's own directions


def test_the_directions_are_orthonormal_and_the_largest_come_first():
    model = network("bert")
    directions = principal_directions(model)
    torch.testing.assert_close(directions @ directions.T, torch.eye(32), rtol=0, atol=1e-5)
    with Activations(model).taken() as stacks:
        read(model, torch.randint(40, (16, 64), generator=torch.Generator().manual_seed(0)))
        sizes = sum(
            (hidden.flatten(0, 1) @ directions.T).square().mean(0) / hidden.square().mean()
            for hidden in stacks["layers"].hidden.values()
        )
    assert (sizes.diff() <= 1e-3 * sizes[0]).all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "deberta", "t5"])
def test_a_projected_student_says_more_of_what_its_teacher_says(name):
    """Of a teacher whose embeddings lie in few directions, which none of the axes is."""
    teacher = network(name)
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0][:16]
        embeddings = teacher.get_input_embeddings().weight
        embeddings.copy_(torch.randn(40, 16, generator=torch.Generator().manual_seed(4)) @ basis)
    ids, found = torch.randint(40, (4, 8)), {}
    for narrow in ("slice", "project"):
        part = PartOfTeacher([0, 1, 2], {"hidden_size": 16}, narrow)
        if name in ("bert", "deberta"):
            part.fields["num_attention_heads"] = 2
        config = part.config(teacher.config)
        if name == "llama":
            config.head_dim = 8
        student = LAYOUTS[name][0].from_config(config).eval()
        part.fill(student, teacher)
        p, q = (read(model, ids).logits.log_softmax(-1) for model in (teacher, student))
        found[narrow] = float((p.exp() * (p - q)).sum(-1).mean())
        assert json.loads(student.config.to_json_string())
    assert found["project"] < found["slice"]


def test_a_norm_in_fewer_directions_is_the_mean_of_those_that_go_into_each():
    teacher = network("llama")
    for name, weight in teacher.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 2.0)
    part = PartOfTeacher([0, 1, 2], {"hidden_size": 16}, "project")
    config = part.config(teacher.config)
    student = AutoModelForCausalLM.from_config(config)
    directions_cC = part.fill(student, teacher)
    expected = directions_cC.square() @ teacher.model.norm.weight
    torch.testing.assert_close(student.model.norm.weight, expected)
    assert not torch.allclose(expected, teacher.model.norm.weight[:16])


KINDS = {
    "bart": BartConfig(decoder_attention_heads=4, encoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64),
    "bert": BertConfig(),
    "deberta-v2": DebertaV2Config(relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "distilbert": DistilBertConfig(),
    "electra": ElectraConfig(),
    "gpt2": GPT2Config(n_inner=64),
    "llama": LlamaConfig(head_dim=8),
    "mistral": MistralConfig(head_dim=8),
    "nanochat": NanoChatConfig(),
    "opt": OPTConfig(word_embed_proj_dim=32),
    "qwen2": Qwen2Config(),
    "qwen3": Qwen3Config(head_dim=8),
    "roberta": RobertaConfig(),
    "smollm3": SmolLM3Config(pad_token_id=0),
    "t5": T5Config(d_kv=8),
}


@pytest.mark.parametrize("cut", ["inner", "heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_padded_with_zeros_says_what_the_part_says(kind, cut):
    """So that each weight's leading part is a part of what it is: of each head, each gate."""
    assert sorted(KINDS) == sorted(NARROWED)
    config = KINDS[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, value in (sizes | {"num_key_value_heads": 4, "vocab_size": 40}).items():
        field = config.attribute_map.get(name, name)
        if hasattr(config, field):
            setattr(config, field, value)
    for name, value in {"num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 64}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:2])
    inner = [name for name in INNER_SIZES if hasattr(config, name)]
    heads = [name for name in HEADS if hasattr(config, name)]
    fields = dict.fromkeys(inner, 24) if cut == "inner" else dict.fromkeys(heads, 2)
    auto_class = next(
        auto
        for auto in (AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForSeq2SeqLM)
        if type(config) in auto._model_mapping and (kind != "bart" or auto is AutoModelForSeq2SeqLM)
    )
    part = PartOfTeacher([0, 1], fields)
    try:
        smaller = part.config(config)
    except ValueError as error:
        assert cut == "heads" and "make heads of" in str(error)  # where their size follows from their number
        return
    torch.manual_seed(0)
    teacher, student = (auto_class.from_config(c).eval() for c in (config, smaller))
    for weight in teacher.parameters():
        weight.data.normal_(0, 0.3)
    part.fill(student, teacher)
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name, weight in theirs.items():
        if weight.shape != ours[name].shape:
            padded = torch.zeros_like(weight)
            padded[tuple(slice(size) for size in ours[name].shape)] = ours[name]
            weight.copy_(padded)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(read(student, ids).logits, read(teacher, ids).logits, rtol=1e-4, atol=1e-4)


INNER_SIZES = ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "hidden_dim", "d_ff", "n_inner")
HEADS = (
    *("num_attention_heads", "num_key_value_heads", "n_heads", "num_heads"),
    *("encoder_attention_heads", "decoder_attention_heads"),
)


@pytest.mark.parametrize(
    ("config", "fields", "axes"),
    [
        # A width that is also that of a head, or of the embeddings, which lie apart or not.
        (
            Qwen3Config(head_dim=16, num_key_value_heads=2),
            {"hidden_size": 16},
            {"embed_tokens": [1], "2.self_attn.q_norm": []},
        ),
        (
            ElectraConfig(embedding_size=8),
            {"hidden_size": 16, "num_attention_heads": 2},
            {"word_embeddings": [], "embeddings_project": [0]},
        ),
        (
            OPTConfig(word_embed_proj_dim=32, ffn_dim=64),
            {"hidden_size": 16, "word_embed_proj_dim": 16, "num_attention_heads": 2},
            {"embed_tokens": [1], "2.fc1": [1]},
        ),
    ],
)
def test_the_axes_of_hidden_states_are_found_whatever_else_has_their_length(config, fields, axes):
    for name, value in {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 40}.items():
        setattr(config, config.attribute_map.get(name, name), value)
    config.max_position_embeddings = 64
    auto_class = AutoModelForMaskedLM if config.model_type == "electra" else AutoModelForCausalLM
    part = PartOfTeacher([0, 1, 2], fields, "project")
    student, teacher = auto_class.from_config(part.config(config)), auto_class.from_config(config)
    part.fill(student, teacher)
    found = axes_of_width(student)
    for end, expected in axes.items():
        assert [found[name] for name in found if name.endswith(f"{end}.weight")] == [expected]
