//! `devkit prepare`: generates what is committed and follows from the migrations and queries: `.sqlx`, and `docs/schema.md`.
//!
//! sqlx's own tool would have to be installed and given a server. This command starts a server and applies the migrations.

mod queries;
mod schema;

use anyhow::{Context, Result, anyhow};
use clap::Args;

use crate::postgres::{Cluster, ClusterOptions};
use crate::workspace;

const DATABASE: &str = "prepare";
const SCHEMA: &str = "docs/schema.md";

/// The settings of `devkit prepare`.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct PrepareArgs {
    /// Change nothing; fail when what is committed is not what would be made.
    #[arg(long)]
    check: bool,
}

/// Generates the files, and writes them or compares them with the committed ones.
pub(crate) async fn run(args: PrepareArgs) -> Result<()> {
    let root = workspace::root()?;
    let cluster = Cluster::start(ClusterOptions::default()).await?;
    cluster.create_database(DATABASE).await?;
    cluster.migrate(DATABASE, &root.join("migrations")).await?;
    let url = cluster.url(DATABASE);

    let schema = schema::describe(&url).await?;
    let same_schema = std::fs::read_to_string(root.join(SCHEMA)).is_ok_and(|committed| committed == schema);
    let made = tokio::task::block_in_place(|| queries::describe(&root, &url))?;
    let folder = root.join(".sqlx");
    let committed = queries::read(&folder)?;
    let mut differences = queries::differences(&committed, &made);
    differences.extend((!same_schema).then(|| format!("{SCHEMA} is not the schema of the migrations")));
    match (args.check, differences.first()) {
        (_, None) => say!("{} queries and the schema, all as committed", made.len()),
        (true, Some(first)) => {
            let more = differences.len() - 1;
            return Err(anyhow!("{first} (and {more} more differences); run `make prepare` and commit what it writes"));
        }
        (false, Some(_)) => {
            queries::write(&folder, &committed, &made)?;
            std::fs::write(root.join(SCHEMA), schema).with_context(|| format!("writing {SCHEMA}"))?;
            say!("{} queries, {} changes", made.len(), differences.len());
        }
    }
    Ok(())
}
