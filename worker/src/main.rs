//! `worker`: see the library for what it does.

use std::process::ExitCode;

use worker::settings::Settings;

fn main() -> ExitCode {
    shared::process::run(run())
}

async fn run() -> ExitCode {
    let settings: Settings = shared::settings::parse();
    match worker::run::until_stopped(settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            error.exit_code()
        }
    }
}
