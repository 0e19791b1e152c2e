//! A node of the built program under mixed load that is killed again and again, and what must hold afterwards.
//!
//! Two ways to spend the same load: [`soak`] lives long and watches what the daemon takes, [`kills`] dies often, half of
//! the time in the middle of something. After every kill all volumes are compared with the journals of what was
//! acknowledged and flushed (`bedplate_testkit::journal`), what was under way has happened or has not, and nothing is
//! left over. Whatever is not so ends the run with a panic that says what; the node's log is printed.

mod act;
mod content;
mod lab;
mod lives;
mod report;
mod watch;

use std::{path::PathBuf, time::Duration};

use bedplate_testkit::{journal::Dice, node::Node};
use clap::Args;

use act::Act;
use lives::{Kill, Lives, Load};
use report::Report;

const MIB: u64 = 1 << 20;

/// What both have.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// What carries requests out, as of `bedplate serve`
    #[arg(long, default_value = "auto")]
    executor: String,
    /// How the mount's requests come, as of `bedplate serve`
    #[arg(long, default_value = "auto")]
    fuse_transport: String,
    /// Where the dice begin
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the figures here after every life, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Live long: mixed load with a kill now and then; memory, descriptors and the disk's use are flat.
#[derive(Args, Clone, Debug)]
pub struct SoakArgs {
    #[arg(long)]
    minutes: u64,
    /// Seconds from one kill to the next
    #[arg(long, default_value_t = 30)]
    kill_every: u64,
    /// Volumes that are written to
    #[arg(long, default_value_t = 4)]
    volumes: usize,
    /// Milliseconds from one change of a writer to the next
    #[arg(long, default_value_t = 20)]
    write_pause: u64,
    /// Milliseconds from one act of a volume's life to the next
    #[arg(long, default_value_t = 1000)]
    act_pause: u64,
    #[command(flatten)]
    common: Common,
}

/// Die often: a kill within a second of each start, every other one while a chosen thing is under way.
#[derive(Args, Clone, Debug)]
pub struct KillsArgs {
    #[arg(long)]
    count: usize,
    /// Volumes that are written to
    #[arg(long, default_value_t = 2)]
    volumes: usize,
    #[command(flatten)]
    common: Common,
}

impl Common {
    fn node(&self) -> Node {
        let mut node = Node::idle();
        let (executor, transport) = (&self.executor, &self.fuse_transport);
        node.wrap(&[
            "env",
            &format!("BEDPLATE_EXECUTOR={executor}"),
            &format!("BEDPLATE_FUSE_TRANSPORT={transport}"),
        ]);
        node
    }

    fn report(&self) -> Report {
        Report::new(
            format!("executor {}, FUSE transport {}", self.executor, self.fuse_transport),
            self.report.clone(),
        )
    }
}

/// Whether everything was flat; its figures are printed.
pub fn soak(args: &SoakArgs) -> bool {
    let load = Load {
        volumes: args.volumes,
        size_bytes: 16 * MIB,
        write_pause: Duration::from_millis(args.write_pause),
        act_pause: Duration::from_millis(args.act_pause),
    };
    let mut lives = Lives::begin(args.common.node(), load, args.common.seed, args.common.report());
    let (time, life) = (Duration::from_secs(args.minutes * 60), Duration::from_secs(args.kill_every));
    while lives.report.elapsed() + life < time {
        lives.live_and_die(Kill::After(life));
        lives.report.write();
    }
    end(lives, life)
}

/// Whether every act was killed often enough; the figures are printed.
pub fn kills(args: &KillsArgs) -> bool {
    let load = Load {
        volumes: args.volumes,
        size_bytes: 8 * MIB,
        write_pause: Duration::from_millis(1),
        act_pause: Duration::ZERO,
    };
    let mut lives = Lives::begin(args.common.node(), load, args.common.seed, args.common.report());
    let mut dice = Dice::new(args.common.seed + 1);
    let every_other = Act::ALL.into_iter().flat_map(|act| [Some(act), None]);
    for act in every_other.cycle().take(args.count) {
        lives.live_and_die(match act {
            Some(act) => Kill::During(act, Duration::from_micros(dice.roll(25_000))),
            None => Kill::After(Duration::from_millis(20 + dice.roll(480))),
        });
        lives.report.write();
    }
    end(lives, Duration::from_secs(1))
}

/// The last life, and what it all came to.
fn end(mut lives: Lives, time: Duration) -> bool {
    lives.live_and_clear_away(time);
    let report = &mut lives.report;
    report.write();
    report.verdict =
        Some(if report.grew().is_empty() { "nothing lost, all flat" } else { "nothing lost, not flat" });
    report.write();
    println!("{}", report.json());
    report.grew().is_empty()
}
