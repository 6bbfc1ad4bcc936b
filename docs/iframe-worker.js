// Search for pages that are opened from a folder, where a browser starts no worker: its script runs in a hidden frame.
// The theme asks for the name IFrameWorker.
window.IFrameWorker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = Object.assign(document.createElement("iframe"), {hidden: true});
    document.body.append(frame);
    this.inside = frame.contentWindow;
    this.inside.document.write(`<body><script>
      postMessage = message => parent.postMessage(message, "*");
      importScripts = (...urls) => urls.reduce((before, src) => before.then(() => new Promise(onload =>
        document.body.append(Object.assign(document.createElement("script"), {src, onload})))), Promise.resolve());
    <\/script><script src="${new URL(url, location)}"><\/script>`);
    this.inside.document.close();
    this.ready = new Promise(loaded => { this.inside.onload = loaded; });  // after write, which takes what was there
    addEventListener("message", ({source, data}) => {
      if (source === this.inside) this.dispatchEvent(new MessageEvent("message", {data}));
    });
  }
  async postMessage(data) {
    await this.ready;
    this.inside.dispatchEvent(new MessageEvent("message", {data: structuredClone(data)}));
  }
};
if (location.protocol === "file:") window.Worker = window.IFrameWorker;
