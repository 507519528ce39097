"""The page's style and its script: both stand in the file itself, which loads nothing."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--line:#dfe3e8;--text:#1c2430;--quiet:#667180;--hue0:#2a6fb5;
  --hue1:#c9611a;--bad:#c02f3c;--warn:#fff4e0;--differs:#fff4e0}
@media (prefers-color-scheme:dark){
  :root{--page:#14181d;--card:#1c2229;--line:#323a44;--text:#e4e8ed;--quiet:#98a3b0;--hue0:#6cb0f2;--hue1:#f09a55;
  --bad:#ff7b84;--warn:#352a17;--differs:#352a17}
}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:20px 20px 60px;background:var(--page);color:var(--text);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:26px;margin:0 0 2px;line-height:1.25}
h2{font-size:21px;margin:44px 0 10px;padding-top:14px;border-top:2px solid var(--line)}
section:first-child h2{margin-top:14px}
h3{font-size:16px;margin:26px 0 8px}
h4{font-size:14px;margin:16px 0 6px}
h5{font-size:12px;margin:0;color:var(--quiet);font-weight:600}
small,.aside,.notes{color:var(--quiet);font-size:13px;font-weight:400}
.aside{margin:6px 0}
.notes{padding-left:18px;margin:8px 0}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:10px 0 0}
a{color:var(--hue0)}
.state{display:inline-block;border:1px solid var(--line);border-radius:10px;padding:0 9px;font-size:12px;
  font-weight:400;vertical-align:middle;color:var(--quiet);white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:8px;margin:12px 0}
.tiles div{background:var(--card);border-radius:8px;padding:8px 12px}
dt{color:var(--quiet);font-size:12px}
dd{margin:0;font-size:15px;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:normal}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:14px}
.wide+.charts{margin-top:14px}
.chart{margin:0;background:var(--card);border-radius:8px;padding:10px 10px 6px;position:relative;min-width:0}
figcaption{font-weight:600;font-size:14px;padding-left:4px}
svg{display:block;max-width:100%}
.chart>svg{width:100%;height:auto;touch-action:pan-y}
svg text{font-size:11px;fill:var(--quiet);font-family:inherit;font-variant-numeric:tabular-nums}
svg .note{font-size:10px;stroke:var(--card);stroke-width:3px;paint-order:stroke}
.grid{stroke:var(--line);fill:none}
.rule{stroke:var(--quiet);stroke-dasharray:2 3;fill:none}
.mark{stroke:var(--bad);stroke-width:2}
.cross{stroke:var(--quiet);fill:none}
.line,.dots,.faint{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.dots{stroke-width:1.3;stroke-opacity:.8}
.faint{stroke-width:1;stroke-opacity:.28}
.dashed{stroke-dasharray:5 4}
.hue0{stroke:var(--hue0)}
.hue1{stroke:var(--hue1)}
.dot.hue0{fill:var(--hue0)}
.dot.hue1{fill:var(--hue1)}
rect.fill0{fill:var(--hue0)}
rect.fill1{fill:var(--hue1)}
.box.fill0,.bar.fill0{background:var(--hue0)}
.box.fill1,.bar.fill1{background:var(--hue1)}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;margin:2px 4px;font-size:12px;color:var(--quiet);min-height:18px}
.legend span{display:inline-flex;align-items:center;gap:5px}
i.box{width:10px;height:10px;padding:0;border-radius:2px;display:inline-block}
.tip{position:absolute;pointer-events:none;background:var(--page);border:1px solid var(--line);border-radius:6px;
  padding:4px 8px;font-size:12px;white-space:nowrap;box-shadow:0 2px 8px #0003;z-index:2;font-variant-numeric:tabular-nums}
.tip b{display:block}
.tip .hue0{color:var(--hue0)}
.tip .hue1{color:var(--hue1)}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:0 36px}
.beside>div{min-width:0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;min-width:min(100%,420px)}
th,td{padding:3px 14px 3px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);font-weight:400}
tbody th{overflow-wrap:normal}
thead th{color:var(--quiet);font-size:12px}
tbody th{color:var(--quiet)}
td{font-variant-numeric:tabular-nums}
.facts td,.hashes td{max-width:520px}
.numbers td,.numbers thead th{white-space:nowrap}
.marked td{background:var(--differs)}
.bars{width:100%}
.bars tbody th{width:170px}
.bars td{white-space:nowrap;padding-right:18px}
.track{display:inline-block;width:calc(100% - 92px);vertical-align:middle}
.bar{display:block;height:11px;border-radius:2px;min-width:1px}
.amount{display:inline-block;width:86px;text-align:right}
code{font:12px ui-monospace,Consolas,monospace;word-break:break-all}
.warnings{background:var(--warn);border-radius:8px;padding:10px 12px 10px 30px;margin:12px 0}
.sample{margin:0 0 18px}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(260px,100%),1fr));gap:8px;margin-top:8px}
div.box{background:var(--card);border-radius:8px;padding:8px 12px;min-width:0}
.prompt{border-left:3px solid var(--hue0)}
.reference{border-left:3px solid var(--line)}
pre{margin:2px 0 0;font:13.5px/1.45 inherit;font-family:inherit;white-space:pre-wrap;max-height:260px;overflow:auto;
  unicode-bidi:isolate}
summary{cursor:pointer;color:var(--hue0);margin:8px 0}
footer{margin-top:40px;color:var(--quiet);font-size:12.5px}
@media (max-width:560px){
  body{padding:14px 12px 40px}
  .tiles{grid-template-columns:repeat(2,minmax(0,1fr))}
  dd{font-size:15px}
  th,td{padding-right:9px}
  .bars tbody th{width:96px}
  .track{width:calc(100% - 80px)}
  .amount{width:76px}
  .bars td{padding-right:0}
}
@media print{
  body{max-width:none}
  .chart,.sample,tr{break-inside:avoid}
}
"""

# The values under the mouse. Everything is set as text, never as HTML.
SCRIPT = """
"use strict";
function told(value){
  if(value===null)return "not finite";
  const size=Math.abs(value);
  return size>=1000?Math.round(value).toLocaleString("en-US"):size&&size<1e-3?value.toExponential(2):String(+value.toPrecision(4));
}
function nearest(xs,x){
  let best=-1;
  for(let i=0;i<xs.length;i++)if(best<0||Math.abs(xs[i]-x)<Math.abs(xs[best]-x))best=i;
  return best;
}
for(const figure of document.querySelectorAll("figure.chart")){
  const source=figure.querySelector("script"),svg=figure.querySelector("svg.plot");
  if(!source||!svg)continue;
  const data=JSON.parse(source.textContent),[low,high]=data.x,[left,right,width]=data.plot;
  const tip=document.createElement("div"),cross=document.createElementNS("http://www.w3.org/2000/svg","path");
  tip.className="tip";tip.hidden=true;cross.setAttribute("class","cross");
  figure.append(tip);svg.append(cross);
  const hide=()=>{tip.hidden=true;cross.removeAttribute("d");};
  const show=event=>{
    const box=svg.getBoundingClientRect(),at=(event.clientX-box.left)/box.width*width;
    const x=low+(at-left)/(right-left)*(high-low);
    if(at<left-8||at>right+8){hide();return;}
    let step=null;
    for(const s of data.series){
      const i=nearest(s.x,x);
      if(step===null||Math.abs(s.x[i]-x)<Math.abs(step-x))step=s.x[i];
    }
    const lines=[];
    for(const s of data.series){
      const i=nearest(s.x,step);
      if(Math.abs(s.x[i]-step)>(high-low)*0.02&&s.x[i]!==step)continue;
      const line=document.createElement("div");
      line.className="hue"+s.h;
      const far=Math.abs(s.x[i]-step)>(high-low)*0.005;
      line.textContent=s.n+": "+told(s.y[i])+(far?" (step "+s.x[i].toLocaleString("en-US")+")":"");
      lines.push(line);
    }
    const head=document.createElement("b");
    head.textContent="step "+step.toLocaleString("en-US");
    tip.replaceChildren(head,...lines);
    tip.hidden=false;
    const place=left+(step-low)/(high-low)*(right-left);
    cross.setAttribute("d","M"+place+" 8V191");
    const frame=figure.getBoundingClientRect(),inside=box.left-frame.left+place/width*box.width;
    const over=inside+14+tip.offsetWidth>frame.width;
    tip.style.left=Math.max(2,over?inside-tip.offsetWidth-14:inside+14)+"px";
    tip.style.top=(box.top-frame.top+12)+"px";
  };
  svg.addEventListener("pointermove",show);
  svg.addEventListener("pointerdown",show);
  svg.addEventListener("pointerleave",hide);
}
"""
