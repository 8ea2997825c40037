"""Infers the roles of a model's tensors from its modules, for families without a row in the table.

``silence`` finds what makes a layer the identity, ``roles`` what each parameter does, ``splits`` the parts of fused
projections, ``layout`` the names on disk, and ``infer`` puts them together. All of it runs on a small random model.
"""
