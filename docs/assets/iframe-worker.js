// Search without a server: a browser runs no worker from file://, but it runs an iframe.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      const start = () => {
        document.body.appendChild(this.frame)
        const inside = this.frame.contentDocument
        inside.open()
        inside.write(
          "<script>self.postMessage = data => parent.postMessage(data, '*')</script>" +
            `<script src="${url}"></script>`
        )
        inside.close()
        this.frame.onload = () => {
          this.loaded = true
          this.waiting.splice(0).forEach(data => this.postMessage(data))
        }
      }
      document.body ? start() : addEventListener("DOMContentLoaded", start)
      addEventListener("message", event => {
        if (event.source === this.frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
    }

    postMessage(data) {
      if (this.loaded)
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
}
