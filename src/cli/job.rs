//! `bedplate job`: work on volumes that outlasts its request.

use clap::Subcommand;

use super::{
    exit::Failure,
    image,
    output::{self, OutputArgs},
    wait::{self, TimeoutArgs, WaitArgs},
};
use crate::api::{client::Client, problem::Code, types::Job};

/// List, wait for and cancel exports, clones, merges and flattening
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List jobs that run, and those that ended a while ago
    #[command(after_long_help = "Bringing in and verifying images is not here; see `bedplate image list`.

Examples:
  bedplate job list
  bedplate job list -o json | jq '.[] | select(.state == \"running\").progress'")]
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one job
    #[command(
        after_long_help = "With --wait it exits as the command that began the job would have: with the code of \
its failure.

Examples:
  bedplate job get 7
  bedplate job get 7 --wait --timeout 10m"
    )]
    Get {
        /// The job's number
        id: u64,
        #[command(flatten)]
        wait: WaitArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Stop a job, and wait until it has ended
    #[command(
        after_long_help = "A cancelled export or full clone leaves nothing; flattening and merging go on from \
where they were when they are done again. A job that has ended (exit 4) and a recovery are not cancelled.

Example:
  bedplate job cancel 7"
    )]
    Cancel {
        /// The job's number
        id: u64,
        #[command(flatten)]
        timeout: TimeoutArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
}

impl Verb {
    pub fn describe(&self) -> &'static str {
        match self {
            Verb::List { .. } => "job list",
            Verb::Get { .. } => "job get",
            Verb::Cancel { .. } => "job cancel",
        }
    }
}

pub async fn run(verb: Verb, client: &Client) -> Result<(), Failure> {
    match verb {
        Verb::List { output } => output.print(&client.jobs().await?, |jobs| table(jobs)),
        Verb::Get { id, wait, output } => {
            let mut job = client.job(id).await?;
            if wait.wait {
                job = wait::job(client, job, wait.timeout).await?;
            }
            output.print(&job, details)
        }
        Verb::Cancel { id, timeout, output } => {
            let job = client.cancel_job(id).await?;
            match wait::job(client, job, timeout.timeout).await {
                // As was wished; or it was done before it heard of it.
                Ok(_) | Err(Failure::Ended { code: Code::Cancelled, .. }) => {}
                Err(failure) => return Err(failure),
            }
            output.print(&client.job(id).await?, details)
        }
    }
}

fn table(jobs: &[Job]) -> String {
    output::listing(
        ["ID", "KIND", "OBJECT", "STATE", "CREATED", ""],
        jobs.iter().map(|job| {
            [
                job.id.to_string(),
                output::word(job.kind),
                job.object.clone(),
                output::word(job.state),
                output::time(Some(job.created_at)),
                remark(job).map_or_else(String::new, |text| output::shortened(&text)),
            ]
        }),
    )
}

/// Why it failed, or how far it is.
fn remark(job: &Job) -> Option<String> {
    let error = job.error.as_ref().map(|problem| problem.detail.clone());
    error.or_else(|| job.progress.as_ref().map(image::progress))
}

fn details(job: &Job) -> String {
    let mut rows = vec![
        ("id", job.id.to_string()),
        ("kind", output::word(job.kind)),
        ("object", job.object.clone()),
        ("state", output::word(job.state)),
    ];
    rows.extend(remark(job).map(|text| ("", text)));
    rows.push(("created", output::time(Some(job.created_at))));
    output::properties(rows)
}
