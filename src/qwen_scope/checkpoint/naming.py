"""From what a user names (a folder, a file, a published group, a hub repository) to the layers behind it."""

from dataclasses import replace
from pathlib import Path

from qwen_scope import catalog, hub
from qwen_scope.checkpoint.contents import Contents, contents_of, layer_of_file, published_layers
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import is_file, is_folder


def find(name: str | Path, revision: str | None, cache_dir: str | Path | None) -> tuple[Contents, str]:
    """What there is under a name, with what only the name or the catalogue says filled in, and what to call it.

    Args:
        name: a folder, a file, a published group or a hub repository, in this order.
        revision: see `qwen_scope.hub`.
        cache_dir: the same.

    Raises:
        QwenScopeError: nothing of that name, or files that cannot be used.
    """
    path = Path(name)
    if is_folder(path):
        path = path.expanduser()
        folder = hub.Folder(path)
        return _completed(contents_of(folder), folder.name, str(folder.absolute))
    if is_file(path):
        return _single_file(path.expanduser())
    group = catalog.find(str(name))
    repo_id = group.repo_id if group else str(name)
    if not hub.is_repo_id(repo_id):
        raise QwenScopeError(f"expected a folder or a file of SAEs at {name}, found nothing there; check the path")
    if "/" not in repo_id:
        near = " or ".join(catalog.nearest(repo_id)) or f"something like {catalog.PUBLISHED[0].short_name}"
        raise QwenScopeError(
            f"expected a folder, a file, a published group or a hub repository org/name, found {repo_id!r}; did you "
            f"mean {near}?"
        )
    try:
        files = hub.files_of(repo_id, revision, cache_dir)
    except QwenScopeError as error:
        near = " or ".join(catalog.nearest(repo_id))
        if group or not near or not repo_id.lower().startswith("qwen/"):
            raise
        raise QwenScopeError(f"{error}, or did you mean {near}?") from error
    if group and isinstance(files, hub.Repository):
        return _completed(published_layers(files, range(group.n_layers)), repo_id, repo_id)
    return _completed(contents_of(files), repo_id, repo_id)


def _single_file(path: Path) -> tuple[Contents, str]:
    layer = layer_of_file(path.name)
    if layer is None:
        raise QwenScopeError(
            f"expected a file named layer{{n}}.sae.pt or layer{{n}}.safetensors, found {path.name}; rename it, or "
            "pass the folder if it is SAELens' or sparsify's"
        )
    folder = hub.Folder(path.parent)
    return _completed(contents_of(folder, only=path.name), folder.name, str(folder.absolute))


def _completed(contents: Contents, title: str, spelled: str) -> tuple[Contents, str]:
    """Adds what the name says, and the catalogue of it, where the files themselves say nothing."""
    named = catalog.parse_name(spelled)
    if named is None:
        return contents, title
    model, d_sae, k = named
    spelling = f"SAE-Res-{model}-W{d_sae // 1024}K-L0_{k}"
    group = catalog.find(spelling)
    completed = replace(
        contents,
        declared_by=contents.declared_by or f"the name {spelling}",
        backbone=contents.backbone or (group.backbone if group else None),
        k=k if contents.k is None else contents.k,
        d_model=contents.d_model or (group.d_model if group else None),
        d_sae=contents.d_sae or dict.fromkeys(contents.read, d_sae),
    )
    return completed, title
