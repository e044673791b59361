// BullMQ on Redis: addBulk, and one worker with so many jobs at a time. What is completed is removed, which is its fastest.

import { Queue, Worker } from "bullmq";
import { concurrency, inGroups, peer, setting } from "./protocol.js";

const QUEUE = "bench";
const connection = { host: "127.0.0.1", port: Number(setting("REDIS_PORT")), maxRetriesPerRequest: null };

await peer({
  async fill(jobs) {
    const queue = new Queue(QUEUE, { connection });
    const opts = { removeOnComplete: true, removeOnFail: true };
    await inGroups(jobs, 1000, (numbers) => queue.addBulk(numbers.map((number) => ({ name: "noop", data: { number }, opts }))));
    await queue.close();
  },
  async work() {
    const worker = new Worker(QUEUE, async () => {}, { connection, concurrency: concurrency() });
    worker.on("error", (error) => console.error(error));
    return () => worker.close(true);
  },
});
