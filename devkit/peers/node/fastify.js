// The accept path as a Node service of the same shape: Fastify checks the API key and the body against a schema, the row goes to
// Postgres, the job to BullMQ, and then 202. `PROCESSES` of them share the port.

import cluster from "node:cluster";
import { createHash, randomUUID, timingSafeEqual } from "node:crypto";
import { Queue } from "bullmq";
import Fastify from "fastify";
import pg from "pg";
import { setting } from "./protocol.js";

const processes = Number(setting("PROCESSES"));
const schema = {
  body: {
    type: "object",
    required: ["message"],
    additionalProperties: false,
    properties: {
      message: { type: "string", minLength: 1, maxLength: 4096 },
      webhookUrl: { type: "string", maxLength: 2048 },
      webhookHeaders: { type: "object", additionalProperties: { type: "string" } },
      clientRequestId: { type: "string", minLength: 1, maxLength: 128 },
    },
  },
};

const pool = () => new pg.Pool({ connectionString: setting("DATABASE_URL"), max: Math.ceil(20 / processes) });

async function migrate() {
  const connection = pool();
  await connection.query(`
    create table api_keys (id uuid primary key, digest bytea not null unique);
    create table requests (
      id uuid primary key,
      api_key_id uuid not null references api_keys (id),
      message text not null,
      digest bytea not null,
      webhook_url text,
      webhook_headers jsonb,
      client_request_id text,
      state text not null default 'pending',
      created_at timestamptz not null default now()
    );
    create unique index requests_idempotency on requests (api_key_id, client_request_id) where client_request_id is not null;
    create index requests_by_message on requests (digest);
  `);
  await connection.query("insert into api_keys values ($1, $2)", [randomUUID(), sha256(setting("API_KEY"))]);
  await connection.end();
}

const sha256 = (text) => createHash("sha256").update(text).digest();

async function serve() {
  const db = pool();
  const { rows: keys } = await db.query("select id, digest from api_keys");
  const connection = { host: "127.0.0.1", port: Number(setting("REDIS_PORT")), maxRetriesPerRequest: null };
  const queue = new Queue("sign", { connection });
  await queue.waitUntilReady();
  const app = Fastify({ logger: false, ajv: { customOptions: { removeAdditional: false } } });
  app.addHook("onRequest", async (request, reply) => {
    const digest = sha256(request.headers["x-api-key"] ?? "");
    request.key = keys.find((key) => timingSafeEqual(key.digest, digest))?.id;
    if (!request.key) return reply.code(401).send({ code: "unauthorized" });
  });
  app.post("/crypto/sign", { schema }, async (request, reply) => {
    const { message, webhookUrl, webhookHeaders, clientRequestId } = request.body;
    const id = randomUUID();
    const { rows } = await db.query({
      name: "accept",
      text: `insert into requests (id, api_key_id, message, digest, webhook_url, webhook_headers, client_request_id)
             values ($1, $2, $3, $4, $5, $6, $7) returning created_at`,
      values: [id, request.key, message, sha256(message), webhookUrl, webhookHeaders, clientRequestId],
    });
    await queue.add("sign", { id }, { jobId: id, attempts: 10, backoff: { type: "exponential", delay: 1000 } });
    const statusUrl = `/crypto/sign/${id}`;
    reply.code(202).header("location", statusUrl).header("retry-after", "6");
    return { id, status: "pending", message, clientRequestId, attempts: 0, createdAt: rows[0].created_at, statusUrl };
  });
  await app.listen({ host: "127.0.0.1", port: Number(setting("PORT")), backlog: 1024 });
}

if (cluster.isPrimary) {
  await migrate();
  let listening = 0;
  cluster.on("listening", () => {
    listening += 1;
    if (listening === processes) console.log("ready");
  });
  cluster.on("exit", () => process.exit(1));
  for (let n = 0; n < processes; n += 1) cluster.fork();
  process.stdin.resume().on("end", () => process.exit(0));
} else {
  await serve();
}
