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
      line.textContent=s.n+": "+told(s.y[i])+(far?" ("+data.name+" "+s.x[i].toLocaleString("en-US")+")":"");
      lines.push(line);
    }
    const head=document.createElement("b");
    head.textContent=data.name+" "+step.toLocaleString("en-US");
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
