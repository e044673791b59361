//! `api`: see the library for what it does.

use std::process::ExitCode;

use api::settings::{Cli, Command};
use shared::process::ProcessError;

fn main() -> ExitCode {
    shared::process::run(run())
}

async fn run() -> Result<(), ProcessError> {
    let cli: Cli = shared::settings::parse();
    match cli.command {
        None => api::run::until_stopped(cli.settings).await,
        Some(Command::Migrate) => api::run::migrate(&cli.settings).await,
        Some(Command::Keys { command }) => api::keys::run(&cli.settings, command).await,
        Some(Command::Openapi) => {
            println!("{}", api::http::spec());
            Ok(())
        }
    }
}
