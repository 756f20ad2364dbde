"""A contact sheet of images x prompts, so that prompts can be chosen by eye before a run.

Its edits stay in the store, where a run finds those that it wants, too: it draws its own images and
prompts.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from diffusemix_pipeline.datasets.images import UnreadableImageError, decode_square
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.items import Listing
from diffusemix_pipeline.datasets.sources import list_images
from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.editing.generate import generate
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_bytes
from diffusemix_pipeline.locks import using_edits
from diffusemix_pipeline.pictures import contact_sheet
from diffusemix_pipeline.preflight import check_augmentation
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Gate, Settings


def preview(
    source: str, settings: Settings, project: Project, images: int, progress: Progress = silent
) -> bytes:
    """Return a PNG: a row for each of `images` training images, a column for each prompt.

    `source` is a folder or a name, as for a run. Raises UserError where no image can be read.
    """
    check_augmentation(settings)
    every_prompt = settings.model_copy(
        update={
            "source": settings.source.model_copy(update={"train_per_class": None}),
            "editing": settings.editing.model_copy(
                update={"prompts_per_image": "all", "copies": 1, "share": 1, "gate": Gate()}
            ),
        }
    )
    project.state.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="preview-", dir=project.state) as folder, using_edits(project):
        return _sheet(source, every_prompt, project, images, Path(folder), progress)


def _sheet(
    source: str, settings: Settings, project: Project, images: int, work: Path, progress: Progress
) -> bytes:
    listing = list_images(source, project.archives(settings.source.archives), progress)
    _copy_some(source, listing, work / "chosen", images, settings.source.max_pixels)
    raw = ingest(
        str(work / "chosen"),
        settings,
        work / "raw",
        aside=work / "aside",
        train_only=True,
        progress=progress,
    )
    generated = generate(
        raw,
        settings,
        work / "generated",
        store=EditStore(project.edits, settings.storage.edits),
        aside=work / "aside",
        device=choose_device(settings.device),
        progress=progress,
    ).stage
    edits = generated.manifest().set_index(["source_id", "prompt"])["file_name"]
    rows, labels = [], []
    for original in raw.manifest().itertuples():
        names = [edits[original.image_id, prompt] for prompt in settings.editing.prompts]
        contents = [raw.files.read(original.file_name), *map(generated.files.read, names)]
        rows.append([decode_square(content, settings.size) for content in contents])
        labels.append(original.label)
    return contact_sheet(
        rows, row_labels=labels, column_labels=["original", *settings.editing.prompts], cell=128
    )


def _copy_some(source: str, listing: Listing, folder: Path, images: int, max_pixels: int) -> None:
    """Copy the first readable training images, of one class after the other, into class folders."""
    train = listing.rows[listing.rows["split"].isna() | (listing.rows["split"] == "train")]
    turns = train.groupby("label", sort=False).cumcount()
    by_turns = Listing(train.loc[turns.sort_values(kind="stable").index], listing.kind)
    copied = 0
    for label, picture in zip(by_turns.rows["label"], by_turns.pictures(), strict=True):
        try:
            picture.read(max_pixels)
        except UnreadableImageError:
            continue
        content, suffix = picture.stored(max_pixels)
        write_bytes(folder / label / f"{copied}{suffix}", content)
        copied += 1
        if copied == images:
            return
    if not copied:
        raise UserError(f"{source} holds no training image that can be read.")
