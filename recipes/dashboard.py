"""Build the W&B workspace of a kind of run, and a report that sets its runs beside each other.

Run:
    python recipes/dashboard.py pretrain --project lightning-lm-recipes
    python recipes/dashboard.py finetune --project mine --entity my-team --report true
    python recipes/dashboard.py distill --output distill.json

It wants `pip install -e '.[dashboard]'` and `wandb login`; with --output it writes what it would send, without both.
"""

import json
import os
from pathlib import Path
from typing import Literal

from lightning_modules.command_line import OneLineParser, one_line_errors
from lightning_modules.dashboards import DASHBOARDS, JOB_TYPES, MEDIA, Kind, Panel


def dashboard(
    kind: Kind,
    project: str = "lightning-lm-recipes",
    entity: str | None = None,
    report: bool = False,
    output: Path | None = None,
) -> None:
    """Save it to W&B, or write it to a file.

    Args:
        kind: Of the runs that it is for.
        project: Where runs are logged.
        entity: A user or a team. Left out: WANDB_ENTITY, or whoever is logged in.
        report: Whether to build a report, too: curves of all runs, the best one's settings, samples or predictions.
        output: A file for the workspace as W&B understands it.
    """
    require_workspaces()
    entity = entity or os.environ.get("WANDB_ENTITY") or ("entity" if output else whoever_is_logged_in())
    workspace = workspace_of(kind, project, entity)
    if output is not None:
        model = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
        output.write_text(json.dumps(model, indent=2) + "\n")
        print(f"files  {output}")
        return
    try:
        print(f"workspace  {workspace.save().url}")
        if report:
            print(f"report     {report_of(kind, project, entity).save().url}")
    except Exception as error:  # whatever the server or the network says
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"W&B did not take it ({reason}); wandb login, or write it to a file by --output") from None


def require_workspaces() -> None:
    from importlib.util import find_spec

    if find_spec("wandb_workspaces") is None:
        raise ValueError("this needs wandb-workspaces, which is not installed: pip install -e '.[dashboard]'")


def whoever_is_logged_in() -> str:
    import wandb

    try:
        entity = wandb.Api(timeout=5).default_entity
    except Exception:  # no key, no server, no network
        entity = None
    if not entity:
        raise ValueError("not logged in to W&B: wandb login, pass --entity, or write it to a file by --output")
    return entity


def drawn(panel: Panel) -> object:
    import wandb_workspaces.reports.v2 as reports

    return reports.LinePlot(
        title=panel.title, x="tokens", y=list(panel.names), log_y=panel.is_log, smoothing_factor=0.0, title_x="tokens"
    )


def workspace_of(kind: Kind, project: str, entity: str) -> object:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(name=name, panels=[drawn(panel) for panel in panels], is_open=True)
        for name, panels in DASHBOARDS[kind].items()
    ]
    media = [reports.MediaBrowser(media_keys=[MEDIA[kind]]), reports.RunComparer(diff_only="split")]
    sections.append(workspaces.Section(name="Texts and settings", panels=media, is_open=False))
    return workspaces.Workspace(
        entity=entity, project=project, name=f"{kind} (lightning-lm-recipes)", sections=sections
    )


def report_of(kind: Kind, project: str, entity: str) -> object:
    import wandb_workspaces.reports.v2 as reports

    runs = reports.Runset(project=project, entity=entity, filters=f"Metric('JobType') == '{JOB_TYPES[kind]}'")
    blocks: list[object] = [reports.TableOfContents()]
    for name, panels in DASHBOARDS[kind].items():
        blocks += [reports.H1(name), reports.PanelGrid(runsets=[runs], panels=[drawn(panel) for panel in panels])]
    beside = [reports.MediaBrowser(media_keys=[MEDIA[kind]]), reports.RunComparer(diff_only="split")]
    blocks += [reports.H1("Texts and settings"), reports.PanelGrid(runsets=[runs], panels=beside)]
    return reports.Report(project=project, entity=entity, title=f"{kind}: runs beside each other", blocks=blocks)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("kind", type=Literal["pretrain", "finetune", "distill", "compress"], help="Of runs. (required)")
    parser.add_function_arguments(dashboard, as_group=False, skip={"kind"})
    options = parser.parse_args(arguments)
    with one_line_errors():
        dashboard(**options)


if __name__ == "__main__":
    main()
