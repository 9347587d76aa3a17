"""How the page looks, on a wide screen and a narrow one, light, dark and on paper, and what its one script does.

One accent colour; lines and tokens in Okabe and Ito's colours, which colour-blind people tell apart.  Token colours are
see-through, so they fit either background.
"""

from __future__ import annotations

LIGHT = """
--paper:#fff;--card:#f6f7f8;--ink:#191c20;--muted:#5f6772;--grid:#e6e8eb;--accent:#0067a5;--alarm:#b84a00;
--line0:#0072b2;--line1:#d55e00;--line2:#009e73;--line3:#c0649a;--line4:#d99500;--line5:#3fa7dd;--line6:#7159b8;
--line7:#6f757d;--more:213 94 0;--less:0 114 178;--high:0 140 100;--low:136 80 180;
"""

DARK = """
--paper:#131619;--card:#1b1f23;--ink:#e7e9ec;--muted:#9ba4ae;--grid:#2b3036;--accent:#5ab4ee;--alarm:#ff9a5c;
--line0:#4ba9e6;--line1:#ff8b4d;--line2:#2fc394;--line3:#e096c2;--line4:#efb63b;--line5:#93d2f6;--line6:#a994ea;
--line7:#a3aab2;--more:255 126 48;--less:60 160 235;--high:30 190 140;--low:176 120 226;
"""

STYLE = """
:root{color-scheme:light;%s}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;%s}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Inter,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main{max-width:1168px;margin:0 auto;padding:56px 32px 72px}
h1{font-size:32px;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:0}
h2{font-size:21px;line-height:1.3;letter-spacing:-.01em;font-weight:620;margin:72px 0 16px}
h3{font-size:13px;font-weight:600;color:var(--muted);margin:40px 0 16px;padding-top:14px;
border-top:1px solid var(--grid)}
.headline+.lead,.numbers+.lead{margin-top:28px}
h2+h3{margin-top:0}
h4{font-size:13px;font-weight:600;color:var(--muted);margin:0 0 4px}
p{margin:0 0 8px}
small,.note,.empty{font-size:13px;color:var(--muted);font-weight:400}
p.note{margin-top:10px}
a{color:var(--accent)}
.kicker{color:var(--muted);margin:6px 0 0}.kicker span{white-space:nowrap}
.lead{color:var(--muted);max-width:44em}
.verdict{font-size:20px;line-height:1.5;max-width:44em;margin:32px 0 0;letter-spacing:-.005em}
.headline{display:grid;grid-template-columns:repeat(auto-fit,minmax(172px,1fr));gap:32px 24px;margin:40px 0 0}
.headline dt{font-size:13px;color:var(--muted)}
.headline dd{margin:0;line-height:1.35}
.headline .value{font-size:36px;line-height:1.25;font-weight:600;letter-spacing:-.025em}
.headline .good{color:var(--accent)}.headline .bad{color:var(--alarm)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 24px;padding:10px 0;margin:18px 0 0;position:sticky;top:0;
z-index:1;background:var(--paper)}
.key{display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:6px;vertical-align:3px}
.charts{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:36px 32px}
figure{margin:0;min-width:0;break-inside:avoid;display:flex;flex-direction:column;justify-content:space-between}
figcaption span{display:flex;justify-content:space-between;gap:12px}
figcaption strong{font-weight:600}figcaption b{font-weight:600;color:var(--muted)}
figcaption small{display:block;line-height:1.4;min-height:1.4em;margin-bottom:6px}
svg{display:block;width:100%%;height:auto;overflow:visible}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Inter,Arial,sans-serif;font-variant-numeric:tabular-nums}
.tables{columns:2;column-gap:48px}
table{border-collapse:collapse;width:100%%;font-size:14px}
th,td{text-align:left;vertical-align:top;padding:7px 16px 7px 0;border-bottom:1px solid var(--grid);font-weight:400}
.settings :is(th,td){overflow-wrap:anywhere}
th[scope=row]{color:var(--muted);width:28%%}thead th{font-size:13px;color:var(--muted);font-weight:600}
td small{white-space:nowrap}
.findings,.plain{list-style:none;padding:0;margin:0;max-width:52em}
.findings li{border-left:3px solid var(--muted);padding:2px 0 2px 16px;margin:0 0 20px}
.findings .warning{border-color:var(--line4)}.findings .divergence{border-color:var(--alarm)}
.plain li{margin:0 0 6px}
.probe{border-top:1px solid var(--grid);padding:18px 0 14px;break-inside:avoid}
.prompt{font-weight:600;margin:0 0 10px}.prompt small{display:block}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%%),1fr));gap:14px 32px}
.answer p{line-height:1.75;white-space:pre-wrap;margin:0}
.answer h4 small{font-weight:400;margin-left:8px}
.thirds{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:24px 32px}
.sample{font-size:14px;margin:0 0 18px}.sample p{margin:0 0 2px}
em{font-style:normal;font-size:.75em;color:var(--muted);border:1px solid var(--grid);border-radius:4px;padding:0 4px;
margin:0 2px;white-space:nowrap}
.t{border-radius:3px;cursor:default;-webkit-box-decoration-break:clone;box-decoration-break:clone;padding:2px 0}
.t em{color:inherit}.t.on{outline:2px solid var(--ink);outline-offset:1px}
.colouring>input{position:absolute;opacity:0;pointer-events:none}
.colouring>label{display:inline-block;padding:5px 16px;margin:0 -1px 16px 0;border:1px solid var(--grid);font-size:14px;
color:var(--muted);cursor:pointer}
.colouring>label:first-of-type{border-radius:8px 0 0 8px}.colouring>label:last-of-type{border-radius:0 8px 8px 0}
.colouring>input:checked+label{background:var(--card);color:var(--ink);font-weight:600}
.colouring>input:focus-visible+label{outline:2px solid var(--accent)}
.scale{font-size:13px;color:var(--muted);display:flex;flex-wrap:wrap;gap:2px 8px;align-items:center;margin:0 0 20px}
.scale b{font-weight:600;color:var(--ink)}
.scale i{display:inline-block;width:22px;height:14px;margin:0 -7px 0 0;border-radius:0;padding:0;
box-shadow:inset 0 0 0 .5px var(--grid)}
.scale i+b{margin-left:8px}
#by-kl:checked~.scales .v,#by-value:checked~.scales .k{display:none}
%s
#readout{position:fixed;left:50%%;bottom:20px;transform:translateX(-50%%);width:max-content;padding:8px 18px;
max-width:calc(100%% - 32px);background:var(--ink);color:var(--paper);border-radius:20px;font-size:14px;
pointer-events:none}
details{margin-top:20px}summary{cursor:pointer;color:var(--accent);font-size:14px;padding:6px 0}
footer{margin-top:80px;color:var(--muted);font-size:13px}
@media (max-width:860px){.charts,.thirds{grid-template-columns:minmax(0,1fr)}.tables{columns:1}}
@media (min-width:561px) and (max-width:860px){.charts{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media (max-width:560px){
main{padding:32px 20px 56px}h1{font-size:27px}h2{margin-top:56px}.verdict{font-size:18px;margin-top:24px}
.headline{grid-template-columns:repeat(2,minmax(0,1fr));gap:24px 20px}.headline .value{font-size:30px}
.scale i{width:14px;margin-right:-8px}
th,td{padding-right:10px;overflow-wrap:anywhere}
th[scope=row]{width:38%%}.numbers th[scope=row]{width:30%%}.numbers :is(th,td){overflow-wrap:break-word}
table{font-size:13px}td small{white-space:normal;display:block}
}
@media print{
@page{margin:14mm}
body{font-size:10.5pt}main{padding:0;max-width:none}h2{margin-top:32px;break-after:avoid}h3{break-after:avoid}
.charts{grid-template-columns:repeat(3,minmax(0,1fr));gap:20px 24px}svg text{font-size:14px}footer{margin-top:24px}
.thirds{grid-template-columns:repeat(3,minmax(0,1fr))}.sample,.findings li,tr{break-inside:avoid}
.legend{position:static}
.colouring>label,#readout,summary{display:none}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""

SCRIPT = """
(function () {
  var readout = document.getElementById("readout"), on = null;
  function show(token) {
    if (on) on.classList.remove("on");
    on = token;
    readout.hidden = !token;
    if (token) { token.classList.add("on"); readout.textContent = token.dataset.n; }
  }
  function token(event) { return event.target.closest("[data-n]"); }
  document.addEventListener("pointerover", function (event) {
    if (event.pointerType === "mouse") show(token(event));
  });
  document.addEventListener("click", function (event) { show(token(event)); });
})();
"""


def _token_colours() -> str:
    """Three shades of two colours, for KL where it is chosen and for value where that is."""
    rules = []
    for chosen, name, more, less in (("kl", "k", "more", "less"), ("value", "v", "high", "low")):
        for level, shade in enumerate((0.16, 0.36, 0.6), start=1):
            for sign, colour in (("p", more), ("m", less)):
                background = f"background:rgb(var(--{colour})/{shade})"
                rules.append(f"#by-{chosen}:checked~* .{name}{sign}{level}{{{background}}}")
    return "\n".join(rules)


def style() -> str:
    """The page's whole style sheet."""
    keys = "".join(f".key.line{i}{{background:var(--line{i})}}" for i in range(8))
    return STYLE % (" ".join(LIGHT.split()), " ".join(DARK.split()), _token_colours() + keys)
