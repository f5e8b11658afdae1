"""What models are judged by besides the loss: as lm-eval does, at chance by chance, whatever the batches."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPT2Config, LlamaConfig

from datamodules import bias_rows
from datamodules.files import BadRows
from datamodules.questions import Question, read_questions
from datamodules.tokenization import byte_tokenizer, load_tokenizer
from lightning_modules.bootstrap import of_mean, of_ratio
from lightning_modules.compression.opened import Opened, bytes_of_weights, open_model
from lightning_modules.evaluation import bias, choices, generations, harness, judging, tasks
from lightning_modules.evaluation.calibration import calibration_error
from lightning_modules.evaluation.continuations import Continuations, Pair
from lightning_modules.evaluation.judged_table import excess_in_words
from lightning_modules.evaluation.judging import repeated
from lightning_modules.evaluation.measures import Measures
from lightning_modules.evaluation.tasks import of_writing
from lightning_modules.evaluation.token_predictions import predictions
from lightning_modules.likelihood import Scorer, special_tokens_around
from lightning_modules.model_folder import LoadedModel
from lightning_modules.task_scores import TaskScores
from recipes import score

DATA = Path(__file__).parents[2] / "shared" / "data"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PAIRS = [
    Pair("the film was", " fine"),
    Pair("the film was ", "dull and long"),
    Pair("", "a sentence alone"),
    Pair("x", " y"),
    Pair("the film was", " grey"),
]


def causal(uniform: bool = False) -> tuple:
    model, tokenizer = made(AutoModelForCausalLM, LlamaConfig, "causal")
    if uniform:
        torch.nn.init.zeros_(model.lm_head.weight)
    return model, tokenizer


def masked(uniform: bool = False) -> tuple:
    model, tokenizer = made(AutoModelForMaskedLM, BertConfig, "masked")
    if uniform:  # without the embedding, which is the same weight
        model.cls.predictions.decoder.weight = torch.nn.Parameter(torch.zeros(len(tokenizer), SMALL["hidden_size"]))
    return model, tokenizer


def made(auto_class: type, config_class: type, objective: str) -> tuple:
    tokenizer = byte_tokenizer(objective)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.2} | SMALL
    return auto_class.from_config(config_class(**sizes)).eval(), tokenizer


def continuations(made: tuple, is_masked: bool = False, **settings) -> Continuations:
    return Continuations(*made, is_masked, 64, **settings)


# The probability of what goes on


def test_a_continuation_is_as_probable_as_its_tokens_after_the_context():
    model, tokenizer = causal()
    for pair, found in zip(PAIRS, continuations((model, tokenizer))(PAIRS), strict=True):
        ids = tokenizer(pair.context + pair.continuation, return_tensors="pt")["input_ids"][0]
        count = len(pair.continuation.encode()) + (len(pair.context) - len(pair.context.rstrip()))
        if not pair.context:
            ids = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids])
        with torch.no_grad():
            logs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        nats = -logs.gather(1, ids[1:, None])[-count:].sum()
        assert found.nats == pytest.approx(float(nats), rel=1e-5) and found.tokens == count
        assert found.is_greedy == bool((logs.argmax(-1) == ids[1:])[-count:].all())


@pytest.mark.parametrize("is_masked", [False, True])
def test_batches_change_nothing(is_masked):
    found = continuations((masked if is_masked else causal)(), is_masked)
    one, many = found(PAIRS, batch_size=1), found(PAIRS)
    assert [a.nats for a in one] == pytest.approx([a.nats for a in many], rel=1e-5)
    assert [(a.tokens, a.is_greedy) for a in one] == [(a.tokens, a.is_greedy) for a in many]


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_sentence_alone_is_scored_as_a_text(is_masked):
    model, tokenizer = (masked if is_masked else causal)()
    (found,) = continuations((model, tokenizer), is_masked)([Pair("", "a sentence alone")])
    total = Scorer(model, tokenizer, is_masked, 64, None, None, "a").score(["a sentence alone"])
    assert found.nats == pytest.approx(total.nats, rel=1e-5) and found.tokens == total.tokens


def test_of_what_is_too_long_the_end_is_read():
    score = continuations(causal())
    (cut,) = score([Pair("y" * 100 + "x" * 61, "zzzz")])
    (same,) = score([Pair("x" * 61, "zzzz")])
    assert cut.nats == pytest.approx(same.nats, rel=1e-5)
    (longer,) = score([Pair("y", "z" * 90)])
    assert longer.tokens == 64 and score.cut == 2  # which the second was not


def test_what_goes_on_follows_on_the_tokens_of_the_context_alone(monkeypatch):
    """As lm-eval takes them, where the context's last one is another before what goes on."""
    score = continuations(causal())
    monkeypatch.setattr(score, "with_start", lambda text: [5, 6] if text == "the" else [5, 7, 8])
    (row,) = score.rows(Pair("the", "m"))
    assert row.input_ids == [5, 6] and row.targets == [8]


def test_choices_of_one_token_are_read_once():
    score, reads = continuations(causal()), []
    score.model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    together = score([Pair("Answer:", letter) for letter in "ABCD"])
    assert sum(reads) == 1
    alone = [score([Pair("Answer:", letter)])[0] for letter in "ABCD"]
    assert [found.nats for found in together] == pytest.approx([found.nats for found in alone], rel=1e-5)


def test_an_answer_that_melts_into_its_question_is_not_nothing(monkeypatch):
    score = continuations(causal())
    monkeypatch.setattr(score, "with_start", lambda text: [5, 6])  # of both, as a tokenizer that joins them gives
    (found,) = score([Pair("the", "m")])
    assert found.tokens == 1 and found.nats > 0


def test_a_tokenizer_of_another_model_is_told():
    model, tokenizer = causal()
    model.get_input_embeddings().num_embeddings = 3
    with pytest.raises(ValueError, match="the model knows 3 ids"):
        continuations((model, tokenizer))([Pair("to be", " or")])


def test_a_text_without_tokens_shows_no_special_ones():
    model, tokenizer = masked()
    texts = ["a sentence alone", "and one more"]
    nats = []
    for sample in ("a sentence alone", ""):
        scorer = Scorer(model, tokenizer, True, 64, None, None, sample)
        nats.append(scorer.score(texts).nats)
    assert nats[0] == nats[1] and special_tokens_around(tokenizer, "") == special_tokens_around(tokenizer, "a")


def test_unknown_tokens_are_counted():
    model, tokenizer = causal()
    scorer = Scorer(model, tokenizer, False, 64, None, None, "a")
    tokenizer.unk_token = "a"
    list(scorer.rows(["banana", "no"]))
    assert scorer.unknown == 3 and scorer.total.bytes == 8


def test_a_document_begins_where_it_is_told_to():
    model, tokenizer = causal()
    rows = [next(continuations((model, tokenizer), document_start=begins).rows(PAIRS[0])) for begins in (True, False)]
    assert rows[0].input_ids == [tokenizer.bos_token_id, *rows[1].input_ids]


# Questions


def test_rows_are_read_in_the_forms_that_they_are_published_in(tmp_path):
    about = "The following are multiple choice questions (with answers) about high school.\n\n"
    rows = {
        "ready": ({"query": "q", "choices": ["a", "b"], "gold": 1}, ("q", " b", 1)),
        "mmlu": (
            {"subject": "high_school", "question": " why? ", "choices": ["x", "y"], "answer": "B"},
            (f"{about}why?\nA. x\nB. y\nAnswer:", " B", 1),
        ),
        "arc": (
            {"question": "why", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            ("Question: why\nAnswer:", " y", 1),
        ),
        "copa": (
            {"premise": "It rained.", "question": "cause", "choice1": "Clouds.", "choice2": "Sun.", "label": 0},
            ("It rained because", " clouds.", 0),
        ),
        "hellaswag": (
            {"ctx_a": "He [header] runs", "ctx_b": "he", "endings": ["x", "falls [title] y"], "label": "1",
             "activity_label": "Run"},
            ("Run: He runs He", " falls. y", 1),
        ),
        "piqa": ({"goal": "g", "sol1": "s", "sol2": "t", "label": 1}, ("Question: g\nAnswer:", " t", 1)),
        "winogrande": (
            {"context_options": ["He because Ann", "He because Bob"], "continuation": "fell.", "gold": 1},
            ("He because Bob", " fell.", 1),
        ),
    }  # fmt: skip
    for name, (row, (context, answer, gold)) in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        (question,) = read_questions(tmp_path / f"{name}.jsonl", "choices", BadRows(False))
        assert question.gold == gold and question.pairs()[gold] == (context, answer), name
    published = {"sentence": "Ann saw Bob so _ ran.", "option1": "Ann", "option2": "Bob", "answer": "2"}
    (tmp_path / "train_xs.jsonl").write_text(json.dumps(published) + "\n")
    (question,) = read_questions(tmp_path / "train_xs.jsonl", "choices", BadRows(False))
    assert question.pairs()[question.gold] == ("Ann saw Bob so Bob", " ran.")
    (tmp_path / "words.jsonl").write_text(
        '{"text": "to be or not"}\n{"context": "to be ", "continuation": "or", "category": "plays"}\n'
    )
    blanks = list(read_questions(tmp_path / "words.jsonl", "cloze", BadRows(False)))
    assert [blank.group for blank in blanks] == ["", "plays"]
    assert [blank.pairs()[0] for blank in blanks] == [("to be or", " not"), ("to be ", "or")]


def test_a_row_that_is_no_question_is_named_or_counted(tmp_path):
    rows = ('{"query": "q", "choices": ["a"], "gold": 3}', '{"text": "x y"}')
    rows += ('{"query": "q", "choices": "ab", "gold": 1}',)
    rows += ('{"query": "q", "choices": ["a", null], "gold": 0}',)
    rows += ("""{"subject": "s", "question": "q", "choices": "['0', '4']", "answer": 1}""",)
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl, row 1: wants query, choices and gold"):
        list(read_questions(tmp_path / "rows.jsonl", "choices", BadRows(False)))
    bad_rows = BadRows(True)
    assert list(read_questions(tmp_path / "rows.jsonl", "choices", bad_rows)) == []
    assert sum(bad_rows.skipped.values()) == 5
    (tmp_path / "numbers.jsonl").write_text('{"query": "2 + 2 =", "choices": [4, 5], "gold": 0}\n')
    (question,) = read_questions(tmp_path / "numbers.jsonl", "choices", BadRows(False))
    assert question.pairs() == [("2 + 2 =", " 4"), ("2 + 2 =", " 5")]


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_model_that_knows_nothing_scores_chance(is_masked):
    score = continuations((masked if is_masked else causal)(uniform=True), is_masked)
    rng = np.random.default_rng(0)
    questions = [
        Question(("q",) * 4, tuple("".join(rng.choice(list("abc"), 3)) for _ in range(4)), int(rng.integers(4)))
        for _ in range(20)
    ]
    found = choices.choices(questions, choices.answered(questions, score))
    assert found.figures() == pytest.approx({"accuracy": 0.25, "accuracy_by_length": 0.25})
    good = [Question(("", ""), ("a good one", "a bad oned"), 0, "set") for _ in range(8)]
    assert choices.pairs(good, choices.answered(good, score)).figures()["accuracy"] == 0.5
    contrast = [bias_rows.Contrast("he is a nurse", "xx is a nurse", "g")] * 8
    assert bias.contrasts(contrast, score).figures()["prefers_stereotype"] == 0.5
    words = {"stereotype": "aa", "anti-stereotype": "bb", "unrelated": "cc"}
    texts = [bias_rows.Association("they are BLANK.", words, "race", "race/them")] * 8
    assert bias.associations(texts, score).figures() == pytest.approx(
        {"stereotype_score": 50, "lm_score": 50, "icat": 50}
    )


def test_what_a_model_finds_probable_is_what_it_answers():
    model, tokenizer = causal()
    score = continuations((model, tokenizer))
    answers = ("fine", "dull", "grey")
    nats = [found.nats for found in score([Pair("the film was", f" {answer}") for answer in answers])]
    best = int(np.argmin(nats))
    questions = [Question(("the film was",) * 3, answers, gold) for gold in range(3)]
    each = choices.choices(questions, choices.answered(questions, score)).each["accuracy"]
    assert each.tolist() == [float(gold == best) for gold in range(3)]


# Bias


def test_only_what_two_sentences_share_counts_in_a_masked_model():
    model, tokenizer = masked()
    score = continuations((model, tokenizer), True)
    more, less = "he is kind", "she is kind"
    found = bias.contrasts([bias_rows.Contrast(more, less, "g")], score)
    nats = []
    for text, gone in ((more, 0), (less, 1)):  # the s of she is what differs
        ids = score.plain(text)
        total = 0.0
        for place in range(gone, len(ids)):
            row = [*score.around[0], *ids, *score.around[1]]
            target, row[len(score.around[0]) + place] = ids[place], tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, len(score.around[0]) + place]
            total -= float(logits.log_softmax(-1)[target])
        nats.append(total)
    assert found.figures()["nats_between"] == pytest.approx(nats[1] - nats[0], rel=1e-4)


def test_published_files_of_bias_are_read(tmp_path):
    (tmp_path / "crows.csv").write_text(",sent_more,sent_less,stereo_antistereo,bias_type\n0,a b,c b,stereo,age\n")
    assert list(bias_rows.read_crows_pairs(tmp_path / "crows.csv", BadRows(False))) == [
        bias_rows.Contrast("a b", "c b", "age")
    ]
    (tmp_path / "pro_stereotyped_type1.txt.dev").write_text("1 [The nurse] said [she] left.\n")
    (tmp_path / "anti_stereotyped_type1.txt.dev").write_text("1 [The nurse] said [he] left.\n")
    files = sorted(tmp_path.glob("*_stereotyped_*"))
    (pair,) = bias_rows.read_winobias(files)
    assert (pair.more, pair.less, pair.group) == ("The nurse said she left.", "The nurse said he left.", "type1")
    (tmp_path / "more").mkdir()
    for file in files:
        (tmp_path / "more" / file.name).write_text(file.read_text() * 2)
    both = [*files, *sorted((tmp_path / "more").glob("*"))]
    assert len(list(bias_rows.read_winobias(both))) == 3  # of the same names in two folders
    (tmp_path / "anti_stereotyped_type1.txt.dev").unlink()
    with pytest.raises(ValueError, match="lies beside no anti_stereotyped_type1"):
        list(bias_rows.read_winobias(files[1:]))
    kinds = ("stereotype", "anti-stereotype", "unrelated")
    sentences = [
        {"sentence": f"They are {word}.", "gold_label": k} for word, k in zip(("x y", "z", "q"), kinds, strict=True)
    ]
    row = {"context": "They are BLANK.", "bias_type": "race", "target": "them", "sentences": sentences}
    (tmp_path / "dev.json").write_text(json.dumps({"data": {"intrasentence": [row], "intersentence": []}}))
    (found,) = bias_rows.read_stereoset(tmp_path / "dev.json")
    assert list(found.texts.values()) == ["x y", "z", "q"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is no file of StereoSet"):
        list(bias_rows.read_stereoset(tmp_path / "other.json"))


def test_what_fills_a_blank_has_no_marks_and_is_there():
    assert bias_rows.filling("He is BLANK", "He is lazy.") == "lazy"
    assert bias_rows.filling("The BLANK man", "A lazy, man") == "lazy"
    for context, sentence in (("He is BLANK.", "He is ."), ("one two BLANK", "one")):
        with pytest.raises((ValueError, IndexError)):
            bias_rows.filling(context, sentence)


@pytest.mark.parametrize(
    ("groups", "labels", "biased"),
    [
        (["F"], ["boy", "girl"], 1),
        (["M"], ["man", "woman"], 0),
        (["F"], ["F-Black", "M-Black"], 0),
        (["Transgender women", "Transgender men"], ["nonTrans", "trans"], 1),
        (["Black"], ["F-Black", "M-Black"], None),
    ],
)
def test_whom_a_stereotype_is_about_is_found_in_the_words_of_the_answers(groups, labels, biased):
    row = bbq_row("ambig", "neg", 2) | {"additional_metadata": {"stereotyped_groups": groups}}
    row["answer_info"] = {f"ans{i}": [label, label] for i, label in enumerate(labels)} | {"ans2": ["x", "unknown"]}
    assert bias_rows._bias_question(row).biased == biased


def test_bias_of_one_kind_of_context_is_that_kinds_alone(tmp_path, monkeypatch, capsys):
    """Not 0 of the other, and no NaN where a draw has none of a kind."""
    from lightning_modules.evaluation.continuations import Found

    rows = [bbq_row("ambig", "neg", 2)] * 8 + [bbq_row("disambig", "neg", 0)] * 2
    (tmp_path / "age.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(bias_rows.read_bbq(tmp_path / "age.jsonl", BadRows(False)))
    monkeypatch.setattr(
        bias, "answered", lambda rows, *_: [[Found(float(i), 1, False) for i in range(3)] for _ in rows]
    )
    found = bias.bias_questions(read[:8], None)
    assert found.figures() == {"bias_ambiguous": 1.0, "accuracy_ambiguous": 0.0}
    assert "clear" not in "".join(found.lines()).replace("by chance", "") and "NaN" not in json.dumps(found.summary())
    both = bias.bias_questions(read, None)
    assert set(both.intervals()) == set(both.figures()) and len(both.figures()) == 4
    assert all(math.isfinite(end) for ends in both.intervals().values() for end in ends)


def test_rows_that_a_model_cannot_read_whole_are_left_out_of_bias(capsys):
    score = continuations(causal())
    rows = [bias_rows.Contrast("a" * length, "b" * length, "x") for length in (60, 64, 65, 200)]
    assert bias.fitting(rows, bias.sentences_of, [score]) == rows[:2]
    assert "2 of 4 rows have more tokens than a model reads" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of 1 rows fits into 64 tokens"):
        bias.fitting(rows[3:], bias.sentences_of, [score])
    kinds = dict.fromkeys(bias.KINDS, "y" * 60)
    row = bias_rows.Association("x BLANK z", kinds, "race", "t")
    assert bias.sentences_of(row) == [f"x {'y' * 60} z"] * 3


def bbq_row(condition: str, polarity: str, label: int) -> dict:
    return {
        "context": "c", "question": "who?", "ans0": "The old man", "ans1": "The young man", "ans2": "Not known",
        "answer_info": {"ans0": ["grandfather", "old"], "ans1": ["boy", "nonOld"], "ans2": ["not known", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"]}, "context_condition": condition,
        "question_polarity": polarity, "category": "Age", "label": label,
    }  # fmt: skip


def test_bias_of_questions_is_counted_as_its_paper_does(tmp_path, monkeypatch):
    rows = [bbq_row("ambig", "neg", 2), bbq_row("ambig", "nonneg", 2), bbq_row("disambig", "neg", 1)]
    rows += [bbq_row("disambig", "nonneg", 0)] * 5
    (tmp_path / "age.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(bias_rows.read_bbq(tmp_path / "age.jsonl", BadRows(False)))
    assert [row.biased for row in read[:4]] == [0, 1, 0, 1] and all(row.unknown == 2 for row in read)
    said = [0, 2, 0, 1, 1, 0, 0, 2]
    from lightning_modules.evaluation.continuations import Found

    answers = [[Found(float(place != one), 1, False) for place in range(3)] for one in said]
    monkeypatch.setattr(bias, "answered", lambda *_: answers)
    found = bias.bias_questions(read, None).figures()
    # Of the clear ones 5 name somebody, 3 of them as the stereotype has it.
    assert found["bias_clear"] == pytest.approx(2 * 3 / 5 - 1)
    assert found["bias_ambiguous"] == pytest.approx((1 - 0.5) * (2 * 1 / 1 - 1))
    assert found["accuracy_ambiguous"] == 0.5 and found["accuracy_clear"] == pytest.approx(2 / 6)


def test_scores_of_associations_are_means_over_those_they_are_about():
    class Fixed:
        masked = False

        def rows(self, pair):
            return pair.continuation

        def of_rows(self, parts, _):
            from lightning_modules.evaluation.continuations import Found

            return [Found({"a": 1.0, "b": 2.0, "c": 3.0}[part[-1]], 1, False) for part in parts]

    def row(target: str, *words: str) -> bias_rows.Association:
        return bias_rows.Association("they are BLANK", dict(zip(bias.KINDS, words, strict=True)), "race", target)

    rows = [row("x", "a", "b", "c"), row("x", "a", "b", "c"), row("x", "a", "c", "b"), row("y", "b", "a", "c")]
    found = bias.associations(rows, Fixed()).figures()
    assert found["stereotype_score"] == pytest.approx((100 + 0) / 2)
    assert found["lm_score"] == pytest.approx((100 * (1 + 1 + 0.5) / 3 + 100) / 2)
    assert found["icat"] == pytest.approx(found["lm_score"])


# Calibration and agreement


def test_the_calibration_error_is_that_of_the_bins():
    confidence, right = np.array([0.95, 0.95, 0.95, 0.95, 0.5, 0.5]), np.array([1, 1, 1, 0, 1, 1.0])
    assert calibration_error(confidence, right) == pytest.approx((4 * 0.2 + 2 * 0.5) / 6)
    assert calibration_error(np.ones(4), np.ones(4)) == 0
    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(0.5, 1, 500), (rng.random(500) < 0.7).astype(float)
    theirs = binary_calibration_error(torch.tensor(confidence), torch.tensor(right).long(), n_bins=15, norm="l1")
    assert calibration_error(confidence, right) == pytest.approx(float(theirs), rel=1e-5)


def test_token_predictions_are_those_of_the_whole_logits():
    model, tokenizer = causal()
    other = causal()[0]
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    texts = ["a sentence alone", "and one more", "to be or not"]
    scorer = Scorer(model, tokenizer, False, 64, None, None, texts[0])
    rows = [(number, row) for number, text in enumerate(texts) for row in scorer.rows([text])]
    found = predictions(other, [rows[:2], rows[2:]], 3, mask_padding=False, reference=model)
    confidence, right, same, kl = [], [], [], []
    for _, row in rows:
        with torch.no_grad():
            log_q, log_p = (m(torch.tensor([row.input_ids])).logits[0].log_softmax(-1) for m in (other, model))
        confidence += log_q.max(-1).values.exp().tolist()
        right += (log_q.argmax(-1) == torch.tensor(list(row.targets))).double().tolist()
        same += (log_q.argmax(-1) == log_p.argmax(-1)).double().tolist()
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    expected = {"accuracy": np.mean(right), "same_top": np.mean(same), "kl": np.mean(kl)}
    expected["calibration_error"] = calibration_error(np.array(confidence), np.array(right))
    assert found.figures() == pytest.approx(expected, rel=1e-4)
    padded = AutoModelForCausalLM.from_config(model.config).eval()
    padded.load_state_dict(model.state_dict())
    padded.resize_token_embeddings(len(tokenizer) + 50, mean_resizing=False)  # rows that no word has
    wider = predictions(other, [rows], 3, mask_padding=False, reference=padded).figures()
    assert wider["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    itself = predictions(model, [rows], 3, mask_padding=False, reference=model).figures()
    assert itself["kl"] == pytest.approx(0, abs=1e-7) and itself["same_top"] == 1


# Beside another model


def opened(folder: Path, made: tuple) -> Opened:
    for part in made:
        part.save_pretrained(folder)
    return open_model(str(folder))


def test_what_a_new_token_costs_is_of_one_behind_the_prompt(tmp_path):
    """The cache does not grow, however often: a model without further positions would fail at it."""
    tokenizer = byte_tokenizer("causal")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=1)
    call = repeated(opened(tmp_path, (AutoModelForCausalLM.from_config(config), tokenizer)))
    with torch.inference_mode():
        for _ in range(40):
            call()


def test_a_reference_of_fewer_positions_reads_no_more_than_it_can(tmp_path):
    tokenizer = byte_tokenizer("causal")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=1)
    short = opened(tmp_path / "short", (AutoModelForCausalLM.from_config(config), tokenizer))
    models = {"short": short, "long": opened(tmp_path / "long", causal())}
    found = {name: judging.Judged(name, {}) for name in models}
    documents = ["a document of more than sixteen bytes, and of more than the sixty-four of the other one " * 2] * 6
    judging.add_predictions(found, models, documents)
    alone = {"long": judging.Judged("long", {})}
    judging.add_predictions(alone, {"long": models["long"]}, documents)
    assert found["long"].figures["kl"] > 0 and 0 <= found["long"].figures["same_top"] <= 1
    for name, figure in alone["long"].figures.items():  # in its own windows
        assert found["long"].figures[name] == figure


def test_likelihoods_of_another_kind_are_not_compared():
    tokens_D, bytes_D = np.full(8, 10.0), np.full(8, 30.0)
    nats_D = np.arange(20.0, 28.0)
    one = judging.Scored(nats_D, tokens_D, bytes_D)
    assert judging.interval_of_excess(judging.Scored(nats_D, tokens_D, bytes_D, "masked"), one) is None
    fewer = judging.Scored(nats_D, tokens_D, bytes_D - 3)  # which leaves out the first tokens
    assert judging.interval_of_excess(fewer, one) == pytest.approx((100 / 9, 100 / 9))
    first = judging.Judged("a", {"bits_per_byte": 1.0}, kind="causal")
    assert excess_in_words(first)(judging.Judged("b", {"bits_per_byte": 0.5}, kind="masked")) == "of another kind"


def test_weights_that_are_there_twice_count_once(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"x" * 10)
    assert bytes_of_weights(tmp_path) == 10
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 5)
    assert bytes_of_weights(tmp_path) == 15


# What a model writes


def test_the_longest_copied_span_is_found_to_the_byte():
    rng = np.random.default_rng(0)
    trained = bytes(rng.integers(97, 123, 20_000, dtype=np.uint8))
    memory = generations.Memory(trained)
    for length, begin in ((16, 9), (31, 40), (32, 0), (33, 5), (63, 0), (64, 300), (200, 19_000), (1000, 7_777)):
        own = b"0123456789" + trained[begin : begin + length] + b"9876543210"
        longest, covered = memory.copied(own)
        assert longest == length
        assert covered == pytest.approx((length if length >= 64 else 0) / len(own))
    assert memory.copied(b"0" * 500) == (0, 0.0) and memory.copied(b"") == (0, 0.0)
    assert memory.copied(trained[:15] + b"0") == (0, 0.0)
    assert generations.Memory(b"short").copied(trained[:100]) == (0, 0.0)


@pytest.mark.parametrize(
    ("ids", "is_loop"),
    [
        ([1] * 16, True), ([1] * 15, False), ([9, 8, *[1, 2, 3] * 6], True), ([*[1, 2, 3] * 6, 4], False),
        ([*range(10)] * 3, True), ([*range(10)] * 2, False), ([*range(40)], False), ([], False),
        ([*[1, 2, 3] * 6, 1, 2], True),
    ],
)  # fmt: skip
def test_a_loop_is_a_text_that_ends_in_the_same_again_and_again(ids, is_loop):
    assert generations.loops(ids) == is_loop


def test_distinct_n_grams_are_the_share_that_is_new():
    assert generations.distinct([1, 2, 1, 2, 1], 2) == 0.5 and generations.distinct([1, 2, 3], 2) == 1.0
    assert generations.distinct([1], 4) == 1.0


def test_a_model_writes_the_same_in_any_batch_and_ends_where_it_says(monkeypatch):
    model, tokenizer = causal()
    prompts = [[5 + i, 7, 9] for i in range(5)]
    greedy = generations.written(model, tokenizer, prompts, 12, 0.0)
    monkeypatch.setattr(generations, "ROWS", 1)
    assert [text.ids for text in generations.written(model, tokenizer, prompts, 12, 0.0)] == [t.ids for t in greedy]
    sampled = [generations.written(model, tokenizer, prompts, 12, 1.0, seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    own = model.generation_config
    own.repetition_penalty, own.top_p, own.do_sample = 5.0, 0.3, True  # of a file beside a model
    assert generations.written(model, tokenizer, prompts, 12, 0.0) == greedy and model.generation_config is own
    assert generations.written(model, tokenizer, prompts, 12, 1.0, 0) == sampled[0]
    first = greedy[0].ids[0]
    model.generation_config.eos_token_id = first  # what it writes first is now the end
    (ended,) = generations.written(model, tokenizer, prompts[:1], 12, 0.0)
    assert ended.ended and ended.ids == [] and ended.text == ""
    found = generations.judged([ended, *greedy[1:]], generations.Memory(b"x" * 100)).figures()
    assert found["empty"] == found["ended"] == 0.2 and found["longest_copied_bytes"] == 0


def test_texts_are_written_behind_as_many_documents_as_are_long_enough():
    model, tokenizer = causal()
    documents = ["short", "no"] * 40 + [f"a document that is long enough {i}" for i in range(6)]
    loaded = LoadedModel("here", "causal", model, tokenizer)
    found = of_writing(loaded, documents, 4, 8, 4, 1.0, 0, None)
    assert len(found["what the model writes"]) == len(found["what follows in the text"]) == 4


def test_figures_of_a_task_that_are_no_means_have_no_interval(monkeypatch, tmp_path):
    scores = np.array([1.0] * 83 + [0.0] * 17)
    found = TaskScores("f1_macro", True, {"loss": 0.5, "accuracy": 0.83, "f1_macro": 0.8}, scores, [], None)
    monkeypatch.setattr(tasks, "task_scores", lambda config, folder: found)
    monkeypatch.setattr(tasks, "find_folder", lambda model: model)
    measures = tasks.of_tuning(str(tmp_path), tmp_path / "config.yaml")
    assert list(measures.figures()) == ["f1_macro", "loss", "accuracy"]
    low, high = measures.intervals()["accuracy"]
    assert 0.7 < low < 0.8 < 0.86 < high < 0.95 and set(measures.intervals()) == {"accuracy"}


# Intervals


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = of_mean((rng.random(100) < 0.3).astype(float))
        inside += low <= 0.3 <= high
    assert 0.88 <= inside / 200 <= 0.99
    assert of_mean(np.ones(5)) is None and of_ratio(np.ones(5), np.ones(5)) is None
    assert of_ratio(np.full(9, 3.0), np.full(9, 2.0)) == pytest.approx((1.5, 1.5))


def test_figures_of_means_have_intervals_and_groups():
    measures = Measures(
        {"nats": np.arange(1.0, 13.0)}, ["a"] * 6 + ["b"] * 6, {"perplexity": lambda m: np.exp(m["nats"])}
    )
    low, high = measures.intervals()["perplexity"]
    assert low < math.exp(6.5) < high
    groups = measures.by_group()
    assert groups["a"].figures()["perplexity"] == pytest.approx(math.exp(3.5)) and len(groups["b"]) == 6
    assert measures.summary()["groups"]["b"]["count"] == 6


# The command


def test_a_folder_is_judged_by_files_of_questions(tmp_path, capsys):
    for part in causal():
        part.save_pretrained(tmp_path / "model")
    rows = [{"query": f"q{i}", "choices": ["a", "bc"], "gold": i % 2, "category": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "README.md").write_text("no rows")
    words = ["--model", str(tmp_path / "model"), "--task", "choices", "--data.path", str(tmp_path / "data")]
    score.main([*words, "--json"])
    (found,) = json.loads(capsys.readouterr().out)["files"].values()
    assert found["count"] == 12 and found["chance"]["accuracy"] == 0.5 and set(found["groups"]) == {"a", "b"}
    low, high = found["intervals"]["accuracy"]
    assert low <= found["accuracy"] <= high
    score.main(words)
    said = capsys.readouterr().out
    assert "by chance 0.5" in said and "accuracy by length" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "choices"], "pass files by --data.path"),
        (["--task", "choices", "--data.path", "{}", "--stride", "4"], "--stride changes nothing with --task choices"),
        (["--task", "tuned", "--data.path", "{}"], "--data.path changes nothing with --task tuned"),
        (["--task", "tuned", "--dtype", "auto"], "--dtype changes nothing with --task tuned"),
        (["--config", "{}", "--data.path", "{}"], "--config changes nothing with --task text"),
        (["--task", "pairs", "--data.path", "{}", "--document_start", "true"], "--document_start changes nothing"),
        (["--task", "pairs", "--data.path", "{}"], "wants sentence_good and sentence_bad"),
        (["--task", "tuned"], "no config.yaml of a fine-tuning"),
        (["--task", "bbq", "--data.path", "{}"], "is none of BBQ"),
        (["--task", "lm_eval"], "pass --lm_eval.tasks"),
        (["--task", "winobias", "--data.path", "{}"], "no pro_stereotyped_*"),
        (["--task", "crows_pairs", "--data.path", "none.csv"], "none.csv"),
        (["--task", "stereoset", "--data.path", "{}"], "is no file of StereoSet"),
        (["--document_start", "true", "--data.path", "{}"], "--document_start changes nothing"),
    ],
)
def test_mistakes_are_one_line(flags, said, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n')
    for part in causal():
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        score.main(["--model", str(tmp_path / "model"), *(flag.format(tmp_path / "rows.jsonl") for flag in flags)])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in error and "\n" not in error


def lm_eval_task(name: str, kind: str, rows: Path) -> dict:
    mean = {"aggregation": "mean", "higher_is_better": True}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    task |= {"test_split": "test", "output_type": "loglikelihood" if kind == "cloze" else "multiple_choice"}
    if kind == "cloze":
        task |= {"doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}"}
        task["metric_list"] = [{"metric": "acc"} | mean, {"metric": "perplexity", "aggregation": "perplexity"}]
        return task
    task["metric_list"] = [{"metric": metric} | mean for metric in ("acc", "acc_norm")]
    if kind == "pairs":
        return task | {"doc_to_text": "", "doc_to_target": 0, "doc_to_choice": "{{[sentence_good, sentence_bad]}}"}
    return task | {"doc_to_text": "{{query}}", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}"}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_the_same_rows_score_as_in_lm_eval(tmp_path, capsys):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tasks = DATA / "ckpt_stories260K", {}
    files = {"arc": "eval_mcq/arc_easy", "copa": "eval_mcq/copa", "lambada": "eval_lambada/first_500"}
    files |= {"blimp": "eval_blimp/seven_sets"}
    for name, file in files.items():
        kind = {"lambada": "cloze", "blimp": "pairs"}.get(name, "choices")
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("\n".join((DATA / f"{file}.jsonl").read_text().splitlines()[:100]) + "\n")
        (tmp_path / f"{name}.yaml").write_text(json.dumps(lm_eval_task(name, kind, rows)))
        score.main(["--model", str(model), "--task", kind, "--data.path", str(rows), "--json"])
        (tasks[name],) = json.loads(capsys.readouterr().out)["files"].values()
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(model), dtype="float32", batch_size=8, device="cpu"), tasks=list(tasks),
        task_manager=manager, bootstrap_iters=0,
    )["results"]  # fmt: skip
    for name, ours in tasks.items():
        assert ours["accuracy"] == pytest.approx(theirs[name]["acc,none"], abs=1e-9), name
    for name in ("arc", "copa"):
        assert tasks[name]["accuracy_by_length"] == pytest.approx(theirs[name]["acc_norm,none"], abs=1e-9)
    assert tasks["lambada"]["perplexity"] == pytest.approx(theirs["lambada"]["perplexity,none"], rel=1e-4)
    harness = ["--task", "lm_eval", "--lm_eval.tasks", "[copa, lambada]", "--lm_eval.include_path", str(tmp_path)]
    score.main(["--model", str(model), *harness, "--json"])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]
    assert found["copa"]["acc"] == theirs["copa"]["acc,none"] and found["copa"]["acc_stderr"] > 0
    score.main(["--model", str(model), *harness])
    assert "perplexity" in capsys.readouterr().out


def test_a_filtered_metric_of_lm_eval_has_its_error():
    found = harness.metrics_of({"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1, "acc,none": 1})
    (metric, acc) = harness.lines({"gsm8k": found})[1:]
    assert "exact_match strict-match" in metric and "± 0.1000" in metric and "±" not in acc


def test_of_a_data_set_with_a_held_out_split_that_one_is_scored(monkeypatch, capsys):
    from datamodules import sources

    rows = {name: SimpleNamespace(pieces=lambda *_, n=name: [SimpleNamespace(begins_document=True, text=n)])
            for name in ("train", "validation")}  # fmt: skip
    monkeypatch.setattr(sources, "is_hub_name", lambda path: True)
    monkeypatch.setattr(sources, "hub_splits", lambda name, flag: (rows["train"], rows["validation"]))
    assert list(score.read_documents(score.Texts(path="me/texts"))) == ["validation"]
    assert "of me/texts the validation split is read" in capsys.readouterr().err
    monkeypatch.setattr(sources, "hub_splits", lambda name, flag: (rows["train"], None))
    assert list(score.read_documents(score.Texts(path="me/texts"))) == ["train"]


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_gpt2_like_tokenizers_score_without_a_start():
    tokenizer = load_tokenizer(f"{DATA / 'tok_gpt2' / 'vocab.json'},{DATA / 'tok_gpt2' / 'merges.txt'}")
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=1))
    row = next(Continuations(model, tokenizer, False, 64).rows(Pair("To be or", " not")))
    assert row.input_ids == tokenizer("To be or")["input_ids"]
