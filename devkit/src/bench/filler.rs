//! A table of no use that fills Postgres's buffers.

use anyhow::Result;

use super::world::{Database, World};

/// The bytes of a row: with its header, one row fills a page.
const BODY: &str = "7900";

/// A table that is as large as Postgres's buffers.
///
/// The buffers of a server that has been running for a while are full: to read a page, it must evict another one, and write that first if
/// it was changed. The pages of a dropped database become free, so measurements on a new database would be spared this.
pub(super) struct Filler {
    database: Database,
}

impl Filler {
    const NAME: &str = "filler";

    /// Writes the table, to a database of its own.
    pub(super) async fn make(world: &World) -> Result<Self> {
        let database = world.bare(Self::NAME).await?;
        let mut connection = database.connect().await?;
        let pages = database.number(&mut connection, "select setting::bigint from pg_settings where name = 'shared_buffers'").await?;
        let write = format!(
            "create unlogged table filler (id int primary key, body text);
            alter table filler alter body set storage plain;
            insert into filler select n, repeat('x', {BODY}) from generate_series(1, {pages}) n"
        );
        database.statement(&mut connection, &write).await?;
        database.settle().await?;
        Ok(Self { database })
    }

    /// Reads the whole table, by its index: a sequential scan of a table of this size uses a few buffers only.
    pub(super) async fn fill(&self) -> Result<()> {
        let read = "set enable_seqscan = off; select sum(length(body)) from filler where id > 0";
        self.database.statement(&mut self.database.connect().await?, read).await
    }

    /// Drops the table.
    pub(super) async fn drop(self, world: &World) -> Result<()> {
        world.cluster.drop_database(Self::NAME).await
    }
}
