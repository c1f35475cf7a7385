"""Networks in TorchScript files, which need neither their code nor a download: feature networks and distances."""

import warnings
from pathlib import Path

import torch


def open_script(path: str | Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load the network in the TorchScript file at `path` to `device`, in evaluation mode and without gradients.

    Raises ValueError if the file is absent or no TorchScript.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}: give a TorchScript file, as torch.jit.save writes it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the known networks exist only in this format
            network: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript file: write one with torch.jit.trace and torch.jit.save") from error
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()
