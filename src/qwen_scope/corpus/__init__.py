"""One way to read a corpus: files, folders, tables and Hugging Face datasets, as one stream of documents.

Everything is read as it is asked for, in an order that does not change from run to run, in memory that does not grow
with the corpus. Only a `.json` file that holds one list is read whole.
"""

from qwen_scope.corpus.columns import Document
from qwen_scope.corpus.stream import documents, located, rows

__all__ = ["Document", "documents", "located", "rows"]
