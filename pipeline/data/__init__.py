"""Turns sources of documents and conversations into the token blocks that training reads.

The path of an example: ``sources`` (from ``files``, ``hub_datasets`` or ``python_docs``), ``records``, ``mixture``,
``splits``, ``tokenizer`` or ``chat``, ``blocks``. ``dataset_builder`` puts it together.
"""
