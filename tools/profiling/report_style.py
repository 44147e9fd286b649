"""Colours and style sheet of the report: light and dark as the reader's system has it, wide screens and phones.

A test computes the contrast of every text colour here against what it lies on. The module knows no profile.
"""

from __future__ import annotations

PALETTE: dict[str, tuple[str, str]] = {
    # name: (light, dark)
    "page": ("#f6f7f9", "#0f141a"),
    "card": ("#ffffff", "#182029"),
    "ink": ("#18212c", "#e7ecf2"),
    "muted": ("#525d6a", "#a6b2c0"),
    "line": ("#dde2e8", "#313c49"),
    "on-colour": ("#ffffff", "#0d1218"),
    "accent": ("#2a66ad", "#78aeec"),
    "warning": ("#a3361f", "#ff9d85"),
    "good": ("#1d6b47", "#6fce9f"),
    "llm": ("#7350a3", "#bda2e6"),
    "clip": ("#9c3f76", "#e79cc6"),
    "refiner": ("#1f7268", "#63c8b9"),
    "modulation": ("#6f6212", "#d2c05c"),
    "dit": ("#2a66ad", "#78aeec"),
    "vae_decoder": ("#a8501c", "#f29b66"),
    "guidance": ("#4b57b3", "#a4aef2"),
    "step_change": ("#50701a", "#a9cd68"),
    "step_reuse": ("#b0304f", "#f78fa7"),
    "skipped": ("#b0304f", "#f78fa7"),
    "host": ("#56626f", "#a3afbd"),
    "gemm": ("#2a66ad", "#78aeec"),
    "attention": ("#a8501c", "#f29b66"),
    "convolution": ("#1f7268", "#63c8b9"),
    "norm": ("#7350a3", "#bda2e6"),
    "elementwise": ("#9c3f76", "#e79cc6"),
    "quantise": ("#6f6212", "#d2c05c"),
    "layout": ("#56626f", "#a3afbd"),
    "other": ("#3d4752", "#c3ccd6"),
}

_LIKE = (
    ("dit_", "dit"),
    ("input_change", "step_change"),
    ("head_change", "step_change"),
    ("token_reuse", "step_reuse"),
)

TEXT_ON: tuple[tuple[str, str], ...] = (
    ("ink", "page"),
    ("ink", "card"),
    ("muted", "page"),
    ("muted", "card"),
    ("accent", "card"),
    ("warning", "card"),
    ("good", "card"),
    *(("on-colour", name) for name in (
        "llm", "clip", "refiner", "modulation", "dit", "vae_decoder", "guidance", "step_change",
        "step_reuse", "skipped", "host", "gemm", "attention", "convolution",
        "norm", "elementwise", "quantise", "layout", "other",
    )),
)  # fmt: skip
"""Pairs (text, ground) that occur."""


def colour(name: str) -> str:
    """Return the CSS for a name of the palette, or for one that is like it; unknown names are grey."""
    name = next((like for beginning, like in _LIKE if name.startswith(beginning)), name)
    return f"var(--{name if name in PALETTE else 'host'})"


def _variables(index: int) -> str:
    return "".join(f"--{name}:{values[index]};" for name, values in PALETTE.items())


def style_sheet() -> str:
    """Return the report's CSS."""
    return (
        f":root{{color-scheme:light dark;{_variables(0)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}" + _RULES
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%;overflow-wrap:break-word}
ul{padding-left:1.2rem;margin:.4rem 0}
main{max-width:1080px;margin:0 auto;padding:1.2rem 1rem 3rem}
h1{font-size:1.55rem;line-height:1.2;margin:.2rem 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.12rem;margin:0 0 .2rem}
h3{font-size:.98rem;margin:1.1rem 0 .4rem}
p{margin:.3rem 0 .7rem}
.muted,figcaption,.note{color:var(--muted)}
.small{font-size:.86rem}
code{font-family:ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",monospace;font-size:.88em;overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.1rem;margin:1rem 0}
.banner{border-color:var(--warning);color:var(--warning);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.7rem;margin:1rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem .9rem}
.tile b{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.28rem .5rem;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--muted);font-size:.86rem;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal}
tr.sum td{font-weight:600;border-top:2px solid var(--line)}
.bars{display:grid;grid-template-columns:minmax(5.5rem,max-content) 1fr max-content;gap:.3rem .7rem;align-items:center}
.bars .name{overflow-wrap:anywhere}
.bars .value{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.track{display:flex;height:1.05rem;background:var(--page);border-radius:3px;overflow:hidden}
.track i{display:block;height:100%;min-width:1px}
.lanes{display:grid;grid-template-columns:max-content 1fr;gap:.3rem .7rem;align-items:center}
.lane{position:relative;height:1.6rem;background:var(--page);border-radius:3px;overflow:hidden}
.lane i{position:absolute;top:0;bottom:0;min-width:1px;border-radius:2px;overflow:hidden;font-style:normal;
text-overflow:ellipsis;font-size:.76rem;line-height:1.6rem;padding:0 .3rem;color:var(--on-colour);white-space:nowrap;
box-shadow:inset -1px 0 var(--card)}
.lane i.thin{padding:0}
.lane i.mark{padding:0;min-width:4px;z-index:1;box-shadow:0 0 0 1px var(--card)}
.axis{position:relative;height:1.3rem;font-size:.8rem;color:var(--muted)}
.axis span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.axis .start{transform:none}.axis .end{transform:translateX(-100%)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.5rem 0;font-size:.86rem;color:var(--muted)}
.legend span::before{content:"";display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.4rem;
background:var(--c);vertical-align:-.05rem}
figure{margin:.6rem 0 0}
figcaption{font-size:.86rem;margin-top:.3rem}
.plot{display:grid;grid-template-columns:3.9rem 1fr;grid-template-rows:1.3rem 260px 1.5rem}
.plot .unit{grid-column:1/3;font-size:.8rem;color:var(--muted)}
.plot .y{position:relative;font-size:.8rem;color:var(--muted)}
.plot .y span{position:absolute;right:.45rem;transform:translateY(50%);white-space:nowrap}
.plot .frame{position:relative;border-left:1px solid var(--muted);border-bottom:1px solid var(--muted)}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path,.plot line{vector-effect:non-scaling-stroke;fill:none}
.plot .x{grid-column:2;position:relative;font-size:.8rem;color:var(--muted)}
.plot .x span{position:absolute;top:.15rem;transform:translateX(-50%);white-space:nowrap}
.plot .dot{position:absolute;width:11px;height:11px;border-radius:50%;transform:translate(-50%,50%);
border:1.5px solid var(--card)}
.plot .tag{position:absolute;font-size:.76rem;color:var(--muted);padding-bottom:.1rem;white-space:nowrap}
.layers{list-style:none;margin:0;padding:0;counter-reset:n}
.layers>li{border-top:1px solid var(--line);padding:.7rem 0}
.layers>li:first-child{border-top:0}
.layers .head{display:flex;flex-wrap:wrap;justify-content:space-between;gap:.1rem 1rem;font-weight:600}
.layers .head::before{counter-increment:n;content:counter(n) ". ";margin-right:-.7rem}
.layers .head .words{flex:1 1 12rem}
.layers .track{margin:.35rem 0;height:.55rem}
.layers ul{margin:.3rem 0 0;padding-left:1.1rem}
.layers b{font-weight:600}
.ratio{position:relative;height:1.3rem;background:var(--page);border-radius:3px}
.ratio .one{position:absolute;top:-2px;bottom:-2px;width:0;border-left:2px dashed var(--muted)}
.ratio .span{position:absolute;top:.5rem;height:.3rem;min-width:2px;border-radius:2px;background:var(--accent)}
.ratio .mid{position:absolute;top:.2rem;width:.9rem;height:.9rem;margin-left:-.45rem;border-radius:50%;
background:var(--accent);border:2px solid var(--card)}
.good{color:var(--good)}.bad{color:var(--warning)}
@media (max-width:600px){body{font-size:14px}main{padding:.7rem .6rem 2rem}section{padding:.8rem .75rem}
.plot{grid-template-columns:3.2rem 1fr;grid-template-rows:1.3rem 210px 1.5rem}.tiles{grid-template-columns:1fr 1fr}
.hide-narrow{display:none}.bars{gap:.3rem .45rem}.lanes{gap:.3rem .45rem}}
@media print{section{break-inside:avoid}}
@media (prefers-reduced-motion:no-preference){html{scroll-behavior:smooth}}
"""
