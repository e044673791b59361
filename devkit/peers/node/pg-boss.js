// pg-boss with jobs fetched and completed in batches, through its `fetch` and `complete`: without the pauses of its polling workers.

import { PgBoss } from "pg-boss";
import { concurrency, inGroups, peer, setting } from "./protocol.js";

const QUEUE = "bench";
const batchSize = () => Number(setting("BATCH"));

const start = async (more) => {
  // No schedules and no supervision: nothing but jobs.
  const boss = new PgBoss({ connectionString: setting("DATABASE_URL"), schedule: false, supervise: false, ...more });
  boss.on("error", (error) => console.error(error));
  await boss.start();
  return boss;
};

let boss;
await peer({
  async fill(jobs) {
    boss = await start({});
    await boss.createQueue(QUEUE);
    await inGroups(jobs, 2000, (numbers) => boss.insert(QUEUE, numbers.map((number) => ({ data: { number } }))));
  },
  async prepare() {
    boss = await start({ max: concurrency() + 2, migrate: false });
  },
  async work() {
    let stopping = false;
    const loop = async () => {
      while (!stopping) {
        const jobs = await boss.fetch(QUEUE, { batchSize: batchSize() });
        if (jobs.length > 0) await boss.complete(QUEUE, jobs.map((job) => job.id));
        else await new Promise((resolve) => setTimeout(resolve, 20));
      }
    };
    const loops = Array.from({ length: concurrency() }, loop);
    return async () => {
      stopping = true;
      await Promise.all(loops);
    };
  },
});
