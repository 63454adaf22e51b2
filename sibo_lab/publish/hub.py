"""An export -> a repository of the Hugging Face hub, with its own client. The token is the client's alone: it goes into
requests and nowhere else."""

import re
import warnings
from pathlib import Path

from sibo_lab import files

BESIDE = re.compile(r"\.gitattributes|(LICEN[CS]E|NOTICE|COPYING).*|.*\.(md|png|jpe?g|gif|svg|pdf)", re.I)


def require(name: str) -> None:
    """ValueError unless an export could go to `name`: ORG/NAME, a token is there, and the network may be touched."""
    try:
        from huggingface_hub import constants, get_token, utils  # slow to import
    except ImportError:
        raise ValueError("--push: needs huggingface_hub: pip install huggingface_hub") from None
    try:
        utils.validate_repo_id(name)
        fits = name.count("/") == 1
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"--push: expected ORG/NAME, of letters, digits, -, _ and ., got {files.quoted(name)}")
    if files.offline() or constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push {name}: expected a network, got --offline or HF_HUB_OFFLINE, which forbids it")
    try:
        token = get_token()
    except Exception as e:  # of a token's renewal
        raise OSError(f"--push {name}: the token could not be read ({type(e).__name__}); run `hf auth login`") from None
    if not token:
        raise ValueError(f"--push {name}: expected a token of the hub that may write, got none; run `hf auth login`, "
                         "or set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Uploads `folder` as one commit to the model repository `name`, a new one if need be, of the hub's default
    visibility, and returns its address. OSError says what the hub said, ValueError names a file there that would be
    loaded with these."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError
    token = get_token()
    api = HfApi(token=token)
    try:
        with warnings.catch_warnings(action="ignore"):  # the hub's own, which may repeat what was sent
            url = str(api.create_repo(name, exist_ok=True))
            try:
                there = set(api.list_repo_files(name))
            except HfHubHTTPError as e:
                if e.response.status_code != 404:  # nothing in it yet
                    raise
                there = set()
            ours = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
            others = sorted(n for n in there - ours if not BESIDE.fullmatch(n))
            if not others:
                api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload of a fine-tuned model")
    except Exception as e:  # the client's own, httpx's and the system's
        e = e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ else e  # which says only the file's name
        said = str(e).replace(token or "\0", "…") or type(e).__name__
        raise OSError(f"--push {name}: the upload failed ({files.one_line(ValueError(said))}); {folder} is "
                      f"whole: `hf upload {name} {folder}` tries again") from None
    if others:
        raise ValueError(f"--push {name}: expected a new repository, or one with the same files, got one with "
                         f"{files.quoted(others[0])}, which would be loaded with these; name another, or delete it")
    return url
