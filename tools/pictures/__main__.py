"""`python -m tools.pictures`: writes the pictures, and the tables into the architecture page."""

from tools.pictures.files import ROOT, made


def main() -> None:
    """Write what has changed, and name it."""
    for path, text in made().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


main()
