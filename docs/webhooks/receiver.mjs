// A receiver of webhooks for Node 18 or newer: npm install standardwebhooks
//
// WEBHOOK_SECRET=whsec_… PORT=9200 node receiver.mjs
import { createServer } from "node:http";
import { Webhook } from "standardwebhooks";

const webhook = new Webhook(process.env.WEBHOOK_SECRET);
// In real life this is a table with a unique index, written in the transaction that does the work.
const done = new Set();

createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  // The bytes as they came: parsed and printed again, they would be others, and the signature would not fit.
  const body = Buffer.concat(chunks).toString("utf8");
  let event;
  try {
    event = webhook.verify(body, request.headers);
  } catch {
    response.writeHead(401).end();
    return;
  }
  const id = request.headers["webhook-id"];
  if (!done.has(id)) {
    done.add(id);
    console.log(`${event.type} ${event.data.id}`);
  }
  // Answered before slow work, and also when it was there before: else it is sent again.
  response.writeHead(204).end();
}).listen(Number(process.env.PORT ?? 9200), "127.0.0.1", function () {
  console.log(`listening on ${this.address().port}`);
});
