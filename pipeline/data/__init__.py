"""Turns sources of documents and conversations into the token blocks that training reads.

An example passes through these modules: ``sources`` (reading ``files``, ``hub_datasets`` or ``python_docs``),
``records``, ``mixture``, ``splits``, ``tokenizer`` or ``chat``, and ``blocks``. ``dataset_builder`` connects them.
"""
