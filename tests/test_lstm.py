import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lightning_modules.lstm import LSTMConfig, LSTMForCausalLM, LSTMModel

VOCAB = 97


def lstm(**fields) -> LSTMForCausalLM:
    torch.manual_seed(0)
    # Larger weights than at the start of training: the state matters, and the next tokens differ.
    config = LSTMConfig(**({"vocab_size": VOCAB, "hidden_size": 24, "initializer_range": 1.0} | fields))
    return LSTMForCausalLM(config).double().eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_of_a_fresh_model_is_close_to_log_v():
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=1000, hidden_size=256))
    input_ids = torch.randint(0, 1000, (4, 64))
    assert model(input_ids, labels=input_ids).loss.item() == pytest.approx(math.log(1000), abs=0.02)


def test_a_token_cannot_see_the_future():
    model = lstm()
    embeds = model.get_input_embeddings()(tokens(2, 9)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, 4].sum().backward()
    reach = embeds.grad.abs().sum(-1)
    assert (reach[:, :5] > 0).all()
    assert (reach[:, 5:] == 0).all()


def test_packed_documents_equal_unpacked_ones():
    model = lstm()
    first, second, third, fourth = tokens(1, 5), tokens(1, 7, seed=1), tokens(1, 3, seed=2), tokens(1, 9, seed=3)
    packed = torch.cat([torch.cat([first, second], 1), torch.cat([third, fourth], 1)])
    position_ids = torch.stack(
        [torch.cat([torch.arange(5), torch.arange(7)]), torch.cat([torch.arange(3), torch.arange(9)])]
    )
    unpacked = [model(document).logits for document in (first, second, third, fourth)]
    logits = model(packed, position_ids=position_ids).logits
    torch.testing.assert_close(logits[:1], torch.cat(unpacked[:2], 1))
    torch.testing.assert_close(logits[1:], torch.cat(unpacked[2:], 1))


def test_without_restarting_positions_the_state_goes_on_through_the_row():
    model = lstm()
    row = tokens(1, 8)
    plain = model(row).logits
    torch.testing.assert_close(model(row, position_ids=torch.arange(8)[None]).logits, plain)
    assert not torch.allclose(model(row, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])).logits, plain)


def test_the_gradients_of_packed_documents_equal_those_of_unpacked_ones():
    model = lstm()
    documents = [tokens(1, 6), tokens(1, 4, seed=1)]
    for document in documents:
        model(document).logits.square().sum().backward()
    unpacked = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    position_ids = torch.cat([torch.arange(6), torch.arange(4)])[None]
    model(torch.cat(documents, 1), position_ids=position_ids).logits.square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], unpacked)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str):
    model = lstm()
    document, longer = tokens(1, 4), tokens(1, 7, seed=1)
    padding, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    padded = [padding, document] if side == "left" else [document, padding]
    mask = mask if side == "left" else mask.flip(1)
    batch, mask = torch.cat([torch.cat(padded, 1), longer]), torch.cat([mask, torch.ones_like(mask)])
    logits = model(batch, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1][mask[:1].bool()], model(document).logits[0])
    torch.testing.assert_close(logits[1:], model(longer).logits)


def test_reading_in_two_halves_equals_reading_at_once():
    model = lstm()
    row = tokens(2, 10)
    half = model(row[:, :6], use_cache=True)
    rest = model(row[:, 6:], past_key_values=half.past_key_values)
    torch.testing.assert_close(torch.cat([half.logits, rest.logits], 1), model(row).logits)


def test_a_mask_that_forgets_what_was_already_read_is_refused():
    model = lstm()
    state = model(tokens(1, 6)).past_key_values
    with pytest.raises(ValueError, match="the 6 tokens already read and the 1 new ones need 7"):
        model(tokens(1, 1), past_key_values=state, attention_mask=torch.ones(1, 1))


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 4}, {"num_beams": 3, "do_sample": True}])
def test_generation_from_the_state_equals_reading_everything_again(how: dict):
    model = lstm()
    written = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        written.append(model.generate(tokens(2, 5), max_new_tokens=20, use_cache=use_cache, **how))
    assert written[0].shape == (2, 25)
    assert len(written[0][:, 5:].unique()) > 5
    assert written[0].tolist() == written[1].tolist()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_a_batch_padded_on_the_left_writes_what_each_prompt_writes_alone(how: dict):
    model = lstm()
    short, long = tokens(1, 3), tokens(1, 8, seed=1)
    alone = [model.generate(prompt, max_new_tokens=12, **how)[:, prompt.shape[1] :] for prompt in (short, long)]
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    assert (
        model.generate(batch, attention_mask=mask, max_new_tokens=12, **how)[:, 8:].tolist()
        == torch.cat(alone).tolist()
    )


def test_dropout_works_in_training_only():
    model = lstm(embedding_dropout=0.5, hidden_dropout=0.5, output_dropout=0.5)
    row = tokens(1, 6)
    assert torch.equal(model(row).logits, model(row).logits)
    model.train()
    assert not torch.equal(model(row).logits, model(row).logits)


@pytest.mark.parametrize("field", ["embedding_dropout", "hidden_dropout", "output_dropout"])
def test_each_dropout_field_drops(field: str):
    model = lstm(**{field: 0.5}).train()
    row = tokens(1, 6)
    assert not torch.equal(model(row).logits, model(row).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_shares_the_embedding_only_when_tied(tied: bool):
    model = lstm(embedding_size=16, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    hidden = model.model(input_ids=tokens(1, 4)).last_hidden_state
    assert hidden.shape[-1] == model.get_output_embeddings().weight.shape[1]
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(tokens(1, 4)).logits)


def test_one_batch_can_be_memorised():
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=VOCAB, hidden_size=64))
    batch = tokens(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(200):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("fields", [{}, {"embedding_size": 16}, {"embedding_size": 16, "tie_word_embeddings": False}])
def test_a_saved_folder_gives_the_same_logits(tmp_path: Path, fields: dict):
    model = lstm(**fields)
    model.save_pretrained(tmp_path)
    row = tokens(2, 6)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(row).logits, model(row).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, LSTMModel)
    assert torch.equal(base(row).last_hidden_state, model.model(row).last_hidden_state)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LSTMConfig)


def test_a_saved_folder_loads_where_this_project_is_unknown(tmp_path: Path):
    model = lstm()
    model.save_pretrained(tmp_path / "folder")
    prompt = tokens(1, 4)
    expected = model.generate(prompt, max_new_tokens=8).tolist()
    script = f"""
import sys
sys.modules["lightning_modules"] = None  # an import of this project would fail
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)
assert model.generate(torch.tensor({prompt.tolist()}), max_new_tokens=8).tolist() == {expected}
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
