"""Write the golden files anew, after a change of the format that is meant: ``python -m tests.coding.golden``."""

from tests.coding.golden import rebuild

if __name__ == "__main__":
    for file in rebuild():
        print(f"wrote {file}")
