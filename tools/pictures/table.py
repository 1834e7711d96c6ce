"""The tables of rooms on the architecture page: what each room's docstring says."""

from tools.pictures.house import Room, imports, rooms


def table() -> str:
    """The tables as Markdown, one of the folders and one of the modules at the root.

    A folder's first paragraph says what lives there, the others what it knows. Without others, its imports stand there.
    """
    folders = [_row(room, [*_paragraphs(room), _imported(room)][:2]) for room in rooms() if room.is_folder]
    modules = [_row(room, _paragraphs(room)[:1]) for room in rooms() if not room.is_folder]
    folder_heads = (
        "| layer | folder | what lives there | what it knows, and where the main path enters |",
        "|--:|---|---|---|",
    )
    module_heads = ("| layer | module | what is in it |", "|--:|---|---|")
    return "\n".join([*folder_heads, *folders, "", *module_heads, *modules]) + "\n"


def _row(room: Room, texts: list[str]) -> str:
    link = f"[`{room.label.removeprefix('dispatcher/')}`](../../{room.label})"
    return f"| {room.layer} | {link} | {' | '.join(texts)} |"


def _paragraphs(room: Room) -> list[str]:
    """The first paragraph of a docstring, and what follows it as a second one."""
    first, *more = (" ".join(paragraph.split()) for paragraph in room.docstring.split("\n\n"))
    return [first, " ".join(more)] if more else [first]


def _imported(room: Room) -> str:
    names = [other.name for other in rooms() if other.name in imports().get(room.name, ())]
    return f"It imports {', '.join(f'`{name}`' for name in names)}."
