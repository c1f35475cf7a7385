"""Published token ids and step lists, kept in tests/golden, and how ours compare with them."""

import json
from pathlib import Path
from typing import Any

from ldm.diffusion.schedule import NoiseSchedule, Spacing
from ldm.models.tokens import Tokenizer

_FOLDER = Path(__file__).parent.parent / "golden"
TOKENS: list[dict[str, Any]] = json.loads((_FOLDER / "tokens.json").read_text())["cases"]
SCHEDULES: list[dict[str, Any]] = json.loads((_FOLDER / "schedules.json").read_text())["lists"]

# OpenAI's own code repairs a text before it makes tokens (ftfy, html.unescape). transformers, diffusers and this
# package do not. These are the golden prompts with something to repair.
REPAIRED_BY_OPENAI = {
    "don’t “quote”": "typographic quotes",  # noqa: RUF001
    "“curly” &lt;tag&gt; &amp;amp;": "typographic quotes and HTML entities",
    "&amp; &lt;b&gt;": "HTML entities",
    "ﬁne ﬀ Ⅳ ½": "ligatures",
    "ＦＵＬＬwidth": "full-width letters",  # noqa: RUF001
    "\x00nul\x07bell": "control characters",
    "mojibake â€œ cafÃ©": "text decoded in the wrong encoding",
}

# Our name of each golden list, or why it has none. A sampler takes any list of levels, so a list without a name can
# still be used.
_N_PLUS_1 = "diffusers' DPM++ takes the first n of n + 1 points; no other class does so"
EXPRESSED: dict[str, tuple[Spacing, int] | str] = {
    **{
        f"{name} {spacing} offset{offset}": (spacing, offset)
        for name in ("DDIM", "Euler")
        for spacing in ("leading", "trailing", "linspace")
        for offset in (0, 1)
    },
    "EulerA leading1": ("leading", 1),
    "Euler karras linspace0": ("karras", 0),
    "Euler karras leading1": ("leading_karras", 1),
    "DPM++2M {'use_karras_sigmas': True}": ("karras", 0),
    "DPM++2M {'timestep_spacing': 'trailing'}": ("trailing", 0),
    "Heun": ("linspace", 0),
    "LCM": ("lcm", 0),
    "Euler trailing (turbo) 1": ("trailing", 0),
    "Euler trailing (turbo) 4": ("trailing", 0),
    "Euler zsnr trailing": ("trailing", 0),
    "DDIM zsnr trailing": ("trailing", 0),
    "PNDM sd15": "PNDM evaluates its second step twice; there is no PNDM here",
    "DPM++2M {}": _N_PLUS_1,
    "DPM++2M {'timestep_spacing': 'leading', 'steps_offset': 1}": _N_PLUS_1,
    "DPM++2M {'final_sigmas_type': 'sigma_min'}": _N_PLUS_1,
    "DPM++2M {'euler_at_final': True}": _N_PLUS_1,
    "DPM++2M SDE": _N_PLUS_1,
    "UniPC": _N_PLUS_1,
    "EDM DPM playground": "continuous levels up to 80, for models in EDM's parametrization",
}


def token_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return our ids of `prompt`, with the begin and end tokens."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt), tokenizer.eos_id]


def steps(golden: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return our levels and timesteps for a golden list that has a name in EXPRESSED."""
    spacing, offset = EXPRESSED[golden["name"]]
    schedule = NoiseSchedule(zero_terminal_snr="zsnr" in golden["name"])
    sigmas = schedule.steps(golden["steps"], spacing, offset=offset)
    timesteps = schedule.timestep(sigmas[:-1])
    if golden["name"] == "Heun":  # it lists both calls of a step; ours lists the step
        sigmas = sigmas[:-1].repeat_interleave(2)[1:].tolist() + [0.0]
        timesteps = timesteps.repeat_interleave(2)[1:]
        return sigmas, timesteps.tolist()
    return sigmas.tolist(), timesteps.tolist()
