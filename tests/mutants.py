"""`make mutants`: each mechanism is switched off in a copy, and its tests have to fail there.

Run:
    python -m tests.mutants                     all, about 20 minutes
    python -m tests.mutants --only K3 R2

A test that passes without what it tests says nothing. A mutant is one change of the source; that each still fits the
source is itself a test, test_mutants.py.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.faults import kill_group

ROOT = Path(__file__).parents[1]
LONGEST_SECONDS = 300
FOLDERS = ("lightning_modules", "datamodules", "recipes", "tests", "benchmarks")


class Mutant(NamedTuple):
    promise: str
    """As docs/reliability.md numbers them."""
    without: str
    file: str
    old: str
    new: str
    tests: str
    """Arguments of pytest; or, from "torture" on, of `python -m tests.torture`."""


STEP, RECOVERY = "lightning_modules/exact_step.py", "lightning_modules/callbacks/recovery.py"
FILES, GUARD = "lightning_modules/checkpoint_io.py", "lightning_modules/callbacks/guard.py"
ORDERED, TRACKING, CLI = "datamodules/ordered.py", "lightning_modules/tracking.py", "lightning_modules/cli.py"

STRATEGIES = "lightning_modules/strategies.py"

MUTANTS = (
    Mutant(
        "M3",
        "a name for each attempt",
        "lightning_modules/restarts.py",
        "store=dist.PrefixStore(attempt, store),",
        "store=store,",
        "tests/test_restarts.py -k attempts",
    ),
    Mutant(
        "M4",
        "the end of a block of memory",
        "lightning_modules/simulation.py",
        "        part, size = self._blocks.pop(key)\n        self.bytes[part] -= size\n",
        "        self._blocks.pop(key)\n",
        "tests/test_plan.py -k what_was_planned",
    ),
    Mutant(
        "M4",
        "the places that a mask leaves",
        "lightning_modules/simulation.py",
        "        return max(1, round(mask.numel() * self._labelled))",
        "        return mask.numel()",
        "tests/test_plan.py -k what_was_planned",
    ),
    Mutant(
        "M5",
        "leaving out copies of documents",
        "datamodules/prepare.py",
        "            if is_copy is not None and is_copy[number]:",
        "            if False:",
        "tests/test_prepared.py -k equal_documents",
    ),
    Mutant(
        "M5",
        "the place of a source in a block of a mixture",
        "datamodules/mixture.py",
        "            before_S, after_S = self.taken(block), self.taken(block + 1)",
        "            before_S, after_S = self.taken(0), self.taken(1)",
        "tests/test_prepared.py -k shares",
    ),
    Mutant(
        "M6",
        "the comparison of what ranks were told",
        "lightning_modules/callbacks/agreement.py",
        "        if (wrong := difference(of_ranks)) is None:",
        "        if (wrong := None) is None:",
        "tests/test_agreement.py -k other_flags",
    ),
    Mutant(
        "M1",
        "the copies of what several ranks have",
        "lightning_modules/shards.py",
        "    return ranks // math.prod(size for size, place in places if not place.is_replicate())",
        "    return 1",
        "tests/test_strategies.py -k every_strategy",
    ),
    Mutant(
        "M1",
        "the gradients of other ranks' heads",
        STRATEGIES,
        '            dist.all_reduce(local(gradient), group=self.device_mesh["tensor_parallel"].get_group())\n',
        "            pass\n",
        "tests/test_strategies.py -k normed_heads",
    ),
    Mutant(
        "M1",
        "counting rows once",
        STRATEGIES,
        '        return self.device_mesh["tensor_parallel"].get_local_rank() == 0',
        "        return True",
        "tests/test_strategies.py -k every_strategy",
    ),
    Mutant(
        "M1",
        "sharing out the teacher",
        STRATEGIES,
        "        self._hand_out(network, lambda: shard(network, self._all_ranks))",
        "        pass",
        "tests/test_strategies.py -k keeps_a_part",
    ),
    Mutant(
        "M2",
        "the look at a shard's checksum",
        "lightning_modules/sharded_checkpoints.py",
        "            if sha256(folder / name) != digest:",
        "            if False:",
        "tests/test_strategies.py -k damaged_part",
    ),
    Mutant(
        "M2",
        "the parts of a gradient that other ranks have, in a step that was begun",
        STEP,
        "                    if strategy.is_partial(parameter):  # which adds them up once more",
        "                    if False:",
        "tests/test_strategies.py -k in_its_middle",
    ),
    Mutant(
        "M2",
        "keeping what was saved before",
        STRATEGIES,
        "        if self.is_global_zero and not self._failed:",
        "        if self.is_global_zero:",
        "tests/test_strategies.py -k disk_is_full",
    ),
    Mutant(
        "M2",
        "the divisor of a step that was begun",
        STEP,
        "        if self._divisor_so_far != self._divisor:",
        "        if False:",
        "tests/test_strategies.py -k in_its_middle",
    ),
    Mutant(
        "R1",
        "a checkpoint of the end",
        RECOVERY,
        "        if self._saved_step < trainer.global_step:",
        "        if False:",
        "tests/test_recovery.py -k end_of_a_run",
    ),
    Mutant(
        "R1",
        "a seed for each micro-batch",
        STEP,
        "seed = micro_batch_seed(self.seed, data.batch_row)",
        "seed = torch.default_generator.seed()",
        "tests/test_recovery.py -k at_random_moments",
    ),
    Mutant(
        "R1",
        "the place in the text",
        ORDERED,
        "self.consumed = self._consumed_before_batch = self.consumed_here(state)",
        "pass",
        "tests/test_recovery.py -k at_random_moments",
    ),
    Mutant(
        "R2",
        "the gradients of a step that was saved in its middle",
        STEP,
        "        self._sums = None\n        self._take_up()\n\n",
        "        self._sums = None\n\n",
        "tests/test_recovery.py -k goes_on_from_any_step",
    ),
    Mutant(
        "R2",
        "the validation that was due",
        RECOVERY,
        "epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION",
        "pass",
        "tests/test_recovery.py -k goes_on_from_any_step",
    ),
    Mutant(
        "R3",
        "rows by the number of those consumed",
        ORDERED,
        "(lambda: 0) if overfitting else (lambda: self.consumed)",
        "(lambda: 0)",
        "tests/test_recovery.py -k once_an_epoch",
    ),
    Mutant(
        "R4",
        "the count of micro-batches on another number of ranks",
        STEP,
        "            recount(progress, consumed",
        "            0 and recount(progress, consumed",
        "tests/test_recovery.py -k any_number_of_ranks",
    ),
    Mutant(
        "R5",
        "a prefix for each attempt",
        "lightning_modules/restarts.py",
        "ranks == 1 or dist.is_initialized():",
        "True:",
        "torture --only R5 --times 60 --seed 1",
    ),
    Mutant(
        "R6",
        "signals noted instead of acted on",
        RECOVERY,
        "                signal.signal(number, self._handle)",
        "                pass",
        "tests/test_recovery.py -k goes_on_from_any_step",
    ),
    Mutant(
        "R6",
        "what one rank was told, for all",
        STEP,
        "self.wishes_of_all = [float(wish) for wish in wishes] if self.trainer.world_size > 1 else self.wishes",
        "self.wishes_of_all = self.wishes",
        "tests/test_recovery.py -k any_number_of_ranks",
    ),
    Mutant(
        "R6",
        "an end at the second signal",
        RECOVERY,
        "            os._exit(128 + number)",
        "            return",
        "tests/test_recovery.py -k second_signal",
    ),
    Mutant(
        "R7",
        "the watchdog's end",
        "lightning_modules/callbacks/watchdog.py",
        "            elif looked - since > seconds:",
        "            elif False:",
        "tests/test_recovery.py -k stands_still",
    ),
    Mutant(
        "P1",
        "the division by the step's tokens",
        STEP,
        "self._scale = divided_by / count\n",
        "self._scale = divided_by / (count + 1)\n",
        "tests/test_exact_step.py -k plain_loop",
    ),
    Mutant(
        "P2",
        "a loader that begins at its first batch",
        "datamodules/rows.py",
        "yield from super().__iter__()",
        "return super().__iter__()",
        "tests/test_text.py -k restores_after_iter",
    ),
    Mutant(
        "K1",
        "the comparison on loading",
        FILES,
        "        verify(Path(path))\n        if Path(path).is_dir():",
        "        if Path(path).is_dir():",
        "tests/test_checkpoint_io.py -k found",
    ),
    Mutant(
        "K2",
        "the SHA-256",
        FILES,
        "if digest.hexdigest() != stamp[2].decode() or length",
        "if length",
        "tests/test_checkpoint_io.py -k found",
    ),
    Mutant(
        "K3",
        "another name until the file is whole",
        FILES,
        'temporary = path.with_name(f".{path.name}.partial")',
        "temporary = path",
        "torture --only K3 --times 8 --seed 1",
    ),
    Mutant(
        "K3",
        "reading back what was written",
        FILES,
        "            verify(temporary)\n",
        "",
        "tests/test_checkpoint_io.py -k gets_its_name",
    ),
    Mutant(
        "K3",
        "the flush to the disk",
        FILES,
        "        os.fsync(file.fileno())",
        "        pass",
        "tests/test_checkpoint_io.py -k gets_its_name",
    ),
    Mutant(
        "K3",
        "the exchange of folders",
        FILES,
        "    elif not hasattr(libc",
        "    elif True or not hasattr(libc",
        "tests/test_checkpoint_io.py -k folder_is_replaced",
    ),
    Mutant(
        "K4",
        "going on with a full disk",
        FILES,
        "if free >= needed and not any(",
        "if True or not any(",
        "tests/test_checkpoint_io.py -k disk_is_full",
    ),
    Mutant(
        "K4",
        "keeping what was saved before",
        FILES,
        "        if not self._failed:\n            remove(",
        "        if True:\n            remove(",
        "tests/test_checkpoint_io.py -k disk_is_full",
    ),
    Mutant(
        "K4",
        "the look at the disk before the first step",
        RECOVERY,
        "    if free < 2 * one:",
        "    if False:",
        "tests/test_guard.py -k room_for_two",
    ),
    Mutant(
        "K5",
        "the refusal",
        FILES,
        "    if files:\n        raise ValueError(",
        "    if False:\n        raise ValueError(",
        "tests/test_checkpoint_io.py -k all_are_damaged",
    ),
    Mutant(
        "K6",
        "the comparison of text and flags",
        ORDERED,
        "if changed and not self.allow_changed_data:",
        "if False:",
        "tests/test_text.py -k other_data",
    ),
    Mutant(
        "N1",
        "dropping the step",
        STEP,
        "        if not self.step_is_finite:\n",
        "        if False:\n",
        "tests/test_guard.py -k not_applied",
    ),
    Mutant(
        "N1",
        "the look at loss and gradient",
        STEP,
        "self.step_is_finite = bool(torch.isfinite(nats) & (not_finite == 0))",
        "self.step_is_finite = True",
        "tests/test_guard.py -k dropped_by_all",
    ),
    Mutant(
        "N1",
        "the look at a checkpoint's numbers",
        FILES,
        "        if tensor.is_floating_point() and not (local(tensor) < torch.inf).all():",
        "        if False:",
        "tests/test_checkpoint_io.py -k not_finite",
    ),
    Mutant(
        "N2",
        "the memory of the usual loss",
        GUARD,
        "            self._losses.append(loss)",
        "            pass",
        "tests/test_guard.py -k spike",
    ),
    Mutant(
        "N2",
        "the factor",
        GUARD,
        "elif loss > self.spike_factor * usual:",
        "elif loss > usual:",
        "tests/test_guard.py -k spike",
    ),
    Mutant(
        "O1",
        "doing the whole step again in parts",
        STEP,
        "        self.trainer.optimizers[0].zero_grad()\n        self._take_up()\n        if torch",
        "        if torch",
        "tests/test_exact_step.py -k done_again_in_parts",
    ),
    Mutant(
        "D1",
        "the look for a key that stands twice",
        "datamodules/records.py",
        "_without_repetition if twice else None",
        "None",
        "tests/test_damaged_inputs.py",
    ),
    Mutant(
        "W1",
        "asking the server first",
        TRACKING,
        '    return "online" if answer.ok else "offline"',
        '    return "online"',
        "tests/test_tracking.py -k takes_the_key",
    ),
    Mutant(
        "W1",
        "the shield",
        TRACKING,
        "return _Shielded(WandbLogger.experiment.fget(self), self._give_up)",
        "return WandbLogger.experiment.fget(self)",
        "tests/test_tracking.py -k dies",
    ),
    Mutant(
        "S1",
        "tensors only",
        FILES,
        'map_location=map_location or "cpu", weights_only=True',
        'map_location=map_location or "cpu", weights_only=False',
        "tests/test_checkpoint_io.py -k no_code",
    ),
    Mutant(
        "S2",
        "the list of packages",
        CLI,
        'import_path_denylist=["*", *NEVER]',
        "import_path_denylist=[*NEVER]",
        "tests/test_allowed_imports.py",
    ),
    Mutant(
        "S3",
        "hiding in config.yaml",
        CLI,
        "text = redacted(self.parser.dump(self.config, skip_none=False))",
        "text = self.parser.dump(self.config, skip_none=False)",
        "tests/test_redaction.py -k no_file",
    ),
    Mutant(
        "S4",
        "the refusal",
        "before_torch.py",
        "    if (line := refusal()) is not None:",
        "    if (line := None) is not None:",
        "tests/test_before_torch.py",
    ),
    Mutant(
        "T1",
        "the end of text in what is cut off",
        "datamodules/conversations.py",
        "[*answer[: most - 1], answer[-1]]",
        "answer[:most]",
        "tests/test_completions.py -k too_long",
    ),
    Mutant(
        "T1",
        "the mask of prompts",
        "datamodules/conversations.py",
        "labels = [token if is_learnt else IGNORED for token, is_learnt in zip(ids, learnt, strict=True)]",
        "labels = list(ids)",
        "tests/test_completions.py -k next_tokens",
    ),
    Mutant(
        "T1",
        "every right answer in training",
        "datamodules/completions.py",
        'for reference in record["references"]',
        'for reference in record["references"][:1]',
        "tests/test_completions.py -k lists_are_sentences",
    ),
    Mutant(
        "T2",
        "prompts that end at one column",
        "lightning_modules/completion.py",
        "places_BP = torch.arange(width, device=ids_BT.device) - (width - lengths_B)[:, None]",
        "places_BP = torch.arange(width, device=ids_BT.device).expand(len(lengths_B), width)",
        "tests/test_writing.py -k alone_and",
    ),
    Mutant(
        "T2",
        "the best of several references",
        "lightning_modules/summarization.py",
        "found = [self.rouge.score_multi(right, text) for",
        "found = [self.rouge.score_multi(right[:1], text) for",
        "tests/test_writing.py -k rouge",
    ),
    Mutant(
        "T3",
        "the mask of what is no context",
        "lightning_modules/question_answering.py",
        "return logits_BT2.masked_fill(~self.allowed(batch)[..., None], -torch.inf)",
        "return logits_BT2",
        "tests/test_minilm.py -k batch_as_alone",
    ),
    Mutant(
        "T3",
        "the other windows of a question",
        "lightning_modules/question_answering.py",
        "spans = sorted({Span(*span) for window in windows for span",
        "spans = sorted({Span(*span) for window in windows[:1] for span",
        "tests/test_question_answering.py -k best_span",
    ),
    Mutant(
        "T3",
        "the other ranks' windows",
        "lightning_modules/question_answering.py",
        "        super().gather_predictions()",
        "        pass",
        "tests/test_question_answering.py -k ranks",
    ),
    Mutant(
        "T3",
        "the search for answers whose place is wrong",
        "datamodules/spans.py",
        "            return [found, len(text)]",
        "            return [start, len(text)]",
        "tests/test_spans.py -k wrong",
    ),
    Mutant(
        "T4",
        "token types beside an adapter",
        "lightning_modules/finetune.py",
        "return self.network if self.adapter is None else self.network.base_model.model",
        "return self.network",
        "tests/test_minilm.py -k adapter",
    ),
    Mutant(
        "T4",
        "new parts that an adapter brings along",
        "lightning_modules/finetune.py",
        'self.new_parts = ["pooler"] if any("pooler" in name for name in info["missing_keys"]) else []',
        "pass",
        "tests/test_finetune.py -k ordinary",
    ),
    Mutant(
        "T4",
        "the shift of labels behind a prompt",
        "lightning_modules/completion.py",
        'F.pad(batch["labels"], (self.shift, 0), value=IGNORED)',
        'F.pad(batch["labels"], (0, self.shift), value=IGNORED)',
        "tests/test_writing.py -k pefts",
    ),
    Mutant(
        "T4",
        "the scale of what is kept in dropout",
        "lightning_modules/cpu_kernels.py",
        "return (kept(probabilities_XTT, keep_XTT) @ value_XTK).mul_(ctx.rescale)",
        "return kept(probabilities_XTT, keep_XTT) @ value_XTK",
        "tests/test_cpu_kernels.py -k dropout",
    ),
    Mutant(
        "T5",
        "the refusal to begin with what fine-tuning left",
        "lightning_modules/model_folder.py",
        'tuned = summary.get("objective") in ("labels", "spans", "completions")',
        "return is_language_model(folder)",
        "tests/test_writing.py -k begins_with_pretraining",
    ),
    Mutant(
        "S5",
        "the square of the temperature",
        "lightning_modules/distillation_loss.py",
        "    d_RV *= T * (1 - hard)",
        "    d_RV *= (1 - hard) / T",
        "tests/test_distillation_loss.py -k formula",
    ),
    Mutant(
        "S5",
        "the cut of the vocabulary to the ids that count",
        "lightning_modules/taught.py",
        'settings = {"words": self.vocabulary, "divisor": divisor}',
        'settings = {"divisor": divisor}',
        "tests/test_distillation.py -k tokenizers_ids",
    ),
    Mutant(
        "S5",
        "the mask of tokens without a label",
        "lightning_modules/distillation_loss.py",
        "return torch.where(keep_R[:, None], d_RV.div_(divisor), 0)",
        "return d_RV.div_(divisor)",
        "tests/test_distillation_loss.py -k formula",
    ),
    Mutant(
        "S5",
        "the tail of a cache as an outcome",
        "lightning_modules/distillation_loss.py",
        "d_RV = rest_RV.mul_((1 - tail_R / rest_R)[:, None])",
        "d_RV = rest_RV",
        "tests/test_distillation_loss.py -k tail",
    ),
    Mutant(
        "S6",
        "the teacher's place outside of the module",
        "lightning_modules/teacher.py",
        "class Teacher:",
        "class Teacher(torch.nn.Module):",
        "tests/test_distillation.py -k no_part",
    ),
    Mutant(
        "S6",
        "the step's one temperature",
        "lightning_modules/taught.py",
        "ramps = [_at(value, place) for value in (self.temperature, self.hard_weight)]",
        "ramps = [_at(value, 0.0) for value in (self.temperature, self.hard_weight)]",
        "tests/test_distillation.py -k two_numbers",
    ),
    Mutant(
        "S7",
        "one random beginning for what is drawn",
        "lightning_modules/distillation_loss.py",
        "begin_n1 = torch.rand(",
        "begin_n1 = torch.zeros(len(mass_nV), 1) if mass_nV.requires_grad is False else torch.rand(",
        "tests/test_teacher_cache.py -k average",
    ),
    Mutant(
        "S7",
        "the comparison of a cache's header with the text",
        "datamodules/text.py",
        "            require_equal(self.teacher_cache.folder, self.teacher_cache.about, here)\n",
        "            pass\n",
        "tests/test_teacher_cache.py -k refused",
    ),
    Mutant(
        "S6",
        "the best weights on every rank",
        "lightning_modules/callbacks/report.py",
        "        restore_best(trainer, module)\n"
        "        weights = whole_weights(module.network) if module.is_sharded else None\n"
        "        if not trainer.is_global_zero:\n            return\n",
        "        weights = None\n        if not trainer.is_global_zero:\n            return\n"
        "        restore_best(trainer, module)\n",
        "tests/test_distillation.py -k two_ranks",
    ),
    Mutant(
        "S6",
        "the teacher's own precision",
        "lightning_modules/teacher.py",
        "with torch.autocast(self.network.device.type, enabled=False):",
        "if True:",
        "tests/test_distillation.py -k autocast",
    ),
    Mutant(
        "S6",
        "the digest of a teacher in a checkpoint",
        "lightning_modules/taught.py",
        '"weights of the teachers": [teacher.digest for teacher in self.teachers]',
        '"weights of the teachers": [0 for teacher in self.teachers]',
        "tests/test_distillation.py -k began_with",
    ),
    Mutant(
        "S7",
        "the noise in a cache's header",
        "datamodules/text.py",
        'noise="" if self.objective == "causal" else f"{self.seed} {self.mask_fraction} {self.mean_span}"',
        'noise=""',
        "tests/test_teacher_cache.py -k encoder_decoder",
    ),
    Mutant(
        "S8",
        "the weights of tokens that count",
        "lightning_modules/inner_signals.py",
        "weights_BT = is_real_BT * (labels_of_row_B / is_real_BT.sum(-1).clamp(min=1))[:, None]",
        "weights_BT = torch.ones_like(is_real_BT) * (labels_of_row_B / is_real_BT.shape[1])[:, None]",
        "tests/test_inner_signals.py -k padding",
    ),
    Mutant(
        "S8",
        "the scale of scores by the size of a head",
        "lightning_modules/inner_signals.py",
        "return x_BATD @ y_BATD.mT / math.sqrt(x_BATD.shape[-1])",
        "return x_BATD @ y_BATD.mT",
        "tests/test_inner_signals.py -k is_attention",
    ),
    Mutant(
        "S8",
        "a key for each query that shares it",
        "lightning_modules/inner_signals.py",
        "return by_head_BTGD.repeat_interleave(width // part_BTW.shape[-1], 2).flatten(2)",
        "return by_head_BTGD.repeat(1, 1, width // part_BTW.shape[-1], 1).flatten(2)",
        "tests/test_inner_signals.py -k divided_alike",
    ),
    Mutant(
        "S8",
        "the parts of a matrix that holds queries, keys and values",
        "lightning_modules/activations.py",
        "shared = (output.shape[-1] - width) // 2",
        "width = shared = output.shape[-1] // 3",
        "tests/test_inner_signals.py -k transformers_itself",
    ),
    Mutant(
        "S8",
        "the projections in the optimizer",
        "lightning_modules/taught.py",
        'return groups + ([{"params": projections, "kind": "embedding"}] if projections else [])',
        "return groups",
        "tests/test_inner_signals.py -k trained_beside",
    ),
    Mutant(
        "S8",
        "the stage at which the inside ends",
        "lightning_modules/taught.py",
        "inner = float(self.inner is not None and (not first or place < first))",
        "inner = float(self.inner is not None)",
        "tests/test_inner_signals.py -k first_the_inside",
    ),
    Mutant(
        "S8",
        "the directions of a projected student",
        "lightning_modules/student.py",
        "return torch.linalg.eigh(moments_CC).eigenvectors.T.flip(0).float()",
        "return torch.linalg.eigh(moments_CC).eigenvectors.T.float()",
        "tests/test_inner_signals.py -k largest_come_first",
    ),
    Mutant(
        "S9",
        "a row's own random numbers",
        "lightning_modules/on_policy.py",
        "generator.manual_seed(micro_batch_seed(~seed, row))",
        "generator.manual_seed(torch.initial_seed() + len(drawn))",
        "tests/test_on_policy.py -k however_the_batch",
    ),
    Mutant(
        "S9",
        "the end of a document that does not end a row",
        "lightning_modules/on_policy.py",
        "    network.generation_config = settings",
        "    pass",
        "tests/test_on_policy.py -k from_the_beginning",
    ),
    Mutant(
        "S9",
        "the labels without a loss of their own",
        "lightning_modules/taught.py",
        "if is_own_N is None or not matching.hard_weight:",
        "if True:",
        "tests/test_on_policy.py -k no_loss_but",
    ),
    Mutant(
        "S9",
        "what stands behind the end of an answer",
        "lightning_modules/task_distillation.py",
        "return ids_BU.masked_fill(is_end_BU.cumsum(-1) - is_end_BU.long() > 0, IGNORED)",
        "return ids_BU",
        "tests/test_task_distillation.py -k up_to_the_end",
    ),
    Mutant(
        "N3",
        "the one clock of all ranks",
        "lightning_modules/exact_step.py",
        "self.clock_of_first = float(clock)",
        "self.clock_of_first = None",
        "tests/test_ddp.py -k by_one_clock",
    ),
    Mutant(
        "N3",
        "one moment of the clock for all groups of weights",
        "lightning_modules/scheduled_step.py",
        "if self._progress is None or self._progress[0] != step:",
        "steps = steps[:0]\n        if True:",
        "tests/test_verify.py -k followed_the_clock",
    ),
    Mutant(
        "S10",
        "the order of a teacher's labels",
        "lightning_modules/task_distillation.py",
        "return logits_BL if order_L is None else logits_BL[:, order_L]",
        "return logits_BL",
        "tests/test_task_distillation.py -k another_order",
    ),
    Mutant(
        "S10",
        "the choice of two for each of several labels",
        "lightning_modules/task_distillation.py",
        "return Head(torch.stack([torch.zeros_like(logits_BL), logits_BL], -1).flatten(0, 1))",
        "return Head(torch.stack([-logits_BL, logits_BL], -1).flatten(0, 1))",
        "tests/test_task_distillation.py -k transformers_gives",
    ),
    Mutant(
        "S10",
        "the place that only evens out the ranks",
        "lightning_modules/task_distillation.py",
        'logits_BL = logits_BL[batch["rows"] >= 0]',
        "pass",
        "tests/test_task_distillation.py -k evens_out",
    ),
    Mutant(
        "S7",
        "the bits of an id that lie in the next byte",
        "datamodules/packed_ids.py",
        "for byte in range((7 + width + 7) // 8):",
        "for byte in range(width // 8 + 1):",
        "tests/test_teacher_cache.py -k packed_into",
    ),
    Mutant(
        "S7",
        "a worker's error in one line",
        "lightning_modules/command_line.py",
        "        if told := _told_by_worker(str(error)):",
        "        if told := None:",
        "tests/test_teacher_cache.py -k worker",
    ),
    Mutant(
        "C1",
        "errors that are passed on",
        "lightning_modules/compression/grids.py",
        "        left_RC[:, end:] -= errors_RB @ upper_CC[start:end, end:]\n",
        "",
        "tests/test_quantization.py -k wide_layer",
    ),
    Mutant(
        "C1",
        "products in float32",
        "lightning_modules/compression/grids.py",
        "(codes_RGS * self.scales_RG.float()[..., None])",
        "(codes_RGS.to(self.scales_RG.dtype) * self.scales_RG[..., None])",
        "tests/test_quantization.py -k bit_by_bit",
    ),
    Mutant(
        "C2",
        "exact weights behind the changed ones",
        "lightning_modules/callbacks/changed_weights.py",
        "                module.network.get_parameter(name).copy_(tensor)\n",
        "                pass\n",
        "tests/test_compressed_training.py -k less_than_a_step",
    ),
    Mutant(
        "C2",
        "scales of the best weights",
        "lightning_modules/callbacks/fake_quantization.py",
        "        scales, network = self._scales_of_best(trainer), module.network\n",
        "        scales, network = {n: 1.1 * s for n, s in self.scales.items()}, module.network\n",
        "tests/test_compressed_training.py -k was_trained_bit",
    ),
    Mutant(
        "C3",
        "zeros that stay",
        "lightning_modules/callbacks/sparse_weights.py",
        "            exact[name].mul_(is_kept)\n",
        "",
        "tests/test_compressed_training.py -k zeros_stay",
    ),
    Mutant(
        "C3",
        "the best that is as sparse as asked for",
        "lightning_modules/callbacks/sparse_weights.py",
        "            forget_the_best(module.trainer)\n",
        "            pass\n",
        "tests/test_compressed_training.py -k half_asked",
    ),
    Mutant(
        "C4",
        "heads in whole groups",
        "lightning_modules/compression/reordering.py",
        "                order = in_blocks(order, length // repeats // shared)\n",
        "                order = in_blocks(order, 1)\n",
        "tests/test_pruning.py -k reordering_moves",
    ),
    Mutant(
        "C4",
        "what matters most first",
        "lightning_modules/compression/reordering.py",
        "values.argsort(descending=True)",
        "values.argsort()",
        "tests/test_pruning.py -k nothing_reads",
    ),
    Mutant(
        "C5",
        "the layers that a part has",
        "lightning_modules/compression/super_network.py",
        "        return [number for number in range(depth) if number not in gone]\n",
        "        return list(range(sizes.layers)) if gone else list(range(depth))\n",
        "tests/test_search.py -k least_goes",
    ),
    Mutant(
        "C6",
        "parts of words that are left",
        "lightning_modules/compression/vocabulary.py",
        "            left += [part for pair in parts.get(one, ()) for part in pair]\n",
        "            pass\n",
        "tests/test_pruning.py -k cut_and_read",
    ),
    Mutant(
        "J1",
        "blanks that go with the answer",
        "lightning_modules/evaluation/continuations.py",
        "            context, continuation = context[:-blanks], context[-blanks:] + continuation\n",
        "            pass\n",
        "tests/test_evaluation.py -k as_probable",
    ),
    Mutant(
        "J1",
        "halves for answers that are as probable",
        "lightning_modules/evaluation/choices.py",
        "    return 1 / len(best) if gold in best else 0.0\n",
        "    return float(gold == best[0])\n",
        "tests/test_evaluation.py -k chance",
    ),
    Mutant(
        "J2",
        "leaving out the words that differ",
        "lightning_modules/evaluation/bias.py",
        "        parts = [part for row in rows for part in shared_places(row.more, row.less, score)]\n",
        '        parts = [score.rows(Pair("", text)) for row in rows for text in (row.more, row.less)]\n',
        "tests/test_evaluation.py -k only_what_two_sentences_share",
    ),
    Mutant(
        "J3",
        "the same draws for both models",
        "lightning_modules/bootstrap.py",
        "[values[drawn_SD].sum(1) for values in",
        "[values[numbers.integers(0, D, drawn_SD.shape)].sum(1) for values in",
        "tests/test_search.py -k an_interval_holds",
    ),
    Mutant(
        "J4",
        "what was drawn before a restart",
        "lightning_modules/callbacks/energy.py",
        "        self.drawn = self.before + Drawn(joules, co2e_grams, here.by)\n",
        "        self.drawn = Drawn(joules, co2e_grams, here.by)\n",
        "tests/test_energy.py -k goes_on",
    ),
    Mutant(
        "J5",
        "texts that are no HTML",
        "lightning_modules/pages/page.py",
        "    return f'<pre>{escape(begins)}<span",
        "    return f'<pre>{begins}<span",
        "tests/test_pages.py -k own_figures",
    ),
    Mutant(
        "J6",
        "one run in W&B, however often it goes on",
        TRACKING,
        "        id=run_id(folder),\n",
        "        id=None,\n",
        "tests/test_tracking.py -k same_run",
    ),
    Mutant(
        "J7",
        "the labels of published files",
        "datamodules/bias_rows.py",
        "    return SAME.get(label, label)\n",
        "    return label\n",
        "tests/test_evaluation.py -k words_of_the_answers",
    ),
    Mutant(
        "J7",
        "taking off what a call adds to the cache",
        "lightning_modules/evaluation/judging.py",
        "            behind.crop(-1)\n",
        "            pass\n",
        "tests/test_evaluation.py -k new_token_costs",
    ),
    Mutant(
        "J7",
        "leaving a model's own settings out",
        "lightning_modules/evaluation/generations.py",
        "    network.generation_config = settings  # by which generate() would fill what is left open\n",
        "",
        "tests/test_evaluation.py -k same_in_any_batch",
    ),
    Mutant(
        "J8",
        "the last step's own figures",
        "lightning_modules/callbacks/speed.py",
        " and not trainer.should_stop:\n",
        ":\n",
        "tests/test_tracking.py -k last_step_is_logged",
    ),
    Mutant(
        "J8",
        "taking off half a row",
        TRACKING,
        "            os.ftruncate(place, before)\n",
        "            pass\n",
        "tests/test_tracking.py -k tears_no_row",
    ),
)


def copy(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("before_torch.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)


def passes(folder: Path, tests: str) -> bool:
    """Whether the tests do, on the sources of a folder."""
    kind, _, rest = tests.partition(" ")
    pytest = ["pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    words = ["tests.torture", *rest.split()] if kind == "torture" else pytest
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        code = process.wait(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:  # without its mechanism it hangs
        code = 1
    kill_group(process)
    if kind != "torture" and code not in (0, 1):
        raise RuntimeError(f"pytest {tests} ended with {code}:\n{log.read_text()[-2000:]}")
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({mutant.promise for mutant in MUTANTS}))
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.promise in options.only]
    alive = 0
    for mutant in chosen:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy(folder)
            path = folder / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new, 1))
            lives = passes(folder, mutant.tests)
        alive += lives
        verdict = "LIVES " if lives else "killed"
        print(
            f"{verdict}  {mutant.promise}  without {mutant.without:<58} {time.monotonic() - start:4.0f} s", flush=True
        )
    print(f"{len(chosen) - alive} of {len(chosen)} mutants were killed by their tests")
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
