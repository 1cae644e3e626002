use std::process::ExitCode;

use clap::Parser;
use live_meeting::cli::Cli;

#[actix_web::main]
async fn main() -> ExitCode {
    match Cli::parse().run().await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("live-meeting: {error:#}");
            ExitCode::FAILURE
        }
    }
}
