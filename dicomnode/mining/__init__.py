"""The language in which researchers ask for Series: text to a tree, and what the tree means.

Nothing here knows a database: `store.search` turns a tree into SQL, `evaluate` asks it of one
Series in plain Python.
"""

from dicomnode.mining.evaluate import Record, evaluate
from dicomnode.mining.fields import FIELDS, FUNCTIONS, words
from dicomnode.mining.parse import parse
from dicomnode.mining.tree import Expression

__all__ = ["FIELDS", "FUNCTIONS", "Expression", "Record", "evaluate", "parse", "words"]
