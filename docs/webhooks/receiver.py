# A receiver of webhooks for Python 3.8 or newer: pip install standardwebhooks
#
# WEBHOOK_SECRET=whsec_… PORT=9200 python receiver.py
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["WEBHOOK_SECRET"])
# In real life this is a table with a unique index, written in the transaction that does the work.
done = set()


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        # The bytes as they came: parsed and printed again, they would be others, and the signature would not fit.
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            event = webhook.verify(body, {name.lower(): value for name, value in self.headers.items()})
        except WebhookVerificationError:
            return self.answer(401)
        webhook_id = self.headers["webhook-id"]
        if webhook_id not in done:
            done.add(webhook_id)
            print(event["type"], event["data"]["id"], flush=True)
        # Answered before slow work, and also when it was there before: else it is sent again.
        self.answer(204)

    def answer(self, status):
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "9200"))), Receiver)
print("listening on", server.server_port, flush=True)
server.serve_forever()
