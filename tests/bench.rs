//! `bedplate bench`: a run of a few lanes leaves a report for people and for programs, and two runs can be compared.
//! What the figures are is no matter here.

use std::{fs, process::Stdio};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::util::{
    node::Node,
    run::{run, until},
};

const RUN: &str = "bench run all --rounds 1 --seconds 1 --size 8M --dir . --memory-dir .";

#[test]
fn a_run_reports_its_lanes_their_ratios_and_why_one_is_missing() {
    let dir = Node::idle();
    let lanes = "--workload rr4k-q32,open --only bare,engine-blocking,fuse-classic,qsd-fuse";
    fs::write(dir.scratch("mine"), vec![7; 1 << 20]).unwrap();
    let ended = dir.try_run(&format!("{RUN} {lanes} --target mine --out out -o json"));
    assert!(ended.status.success(), "{}", ended.stderr);
    let report: Value = serde_json::from_slice(&ended.stdout).unwrap();
    let saved: Value = serde_json::from_slice(&fs::read(dir.scratch("out/report.json")).unwrap()).unwrap();
    assert_eq!(report, saved);

    assert_eq!(report["schema"], 1);
    let lanes = report["lanes"].as_array().unwrap();
    let lane = |target: &str| {
        let mut lanes = lanes.iter().filter(|lane| lane["workload"] == "rr4k-q32");
        lanes.find(|lane| lane["target"] == target).unwrap_or_else(|| panic!("{target}: {report}"))
    };
    for target in ["bare", "engine-blocking", "fuse-classic", "mine"] {
        assert_eq!(lane(target)["figures"]["iops"]["samples"].as_array().unwrap().len(), 1);
    }
    for measure in ["client_cpu_us_per_op", "server_cpu_us_per_op", "latency_p99_9_us"] {
        assert!(lane("fuse-classic")["figures"][measure]["median"].is_number(), "{measure}");
    }
    assert!(lane("fuse-classic")["ratios"]["bare"]["iops"]["median"].as_f64().unwrap() > 0.0);
    assert!(lanes.iter().any(|lane| lane["workload"] == "open" && lane["figures"]["millis"].is_object()));
    // A peer is a lane where it is installed, and says so where it is not.
    let is_missing =
        report["missing"].as_array().unwrap().iter().any(|missing| missing["target"] == "qsd-fuse");
    assert_ne!(is_missing, lanes.iter().any(|lane| lane["target"] == "qsd-fuse"));
    let passthrough = |aim: &&Value| aim["target"] == "passthrough";
    let aim = report["aims"].as_array().unwrap().iter().find(passthrough).unwrap();
    assert_eq!(aim["verdict"], "not_measured");

    let page = fs::read_to_string(dir.scratch("out/report.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg") && page.contains("rr4k-q32"));
    assert!(!page.contains("<script"));
    // Nothing stays but what was asked for.
    let left = fs::read_dir(dir.path("scratch")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut left: Vec<_> = left.collect();
    left.sort();
    assert_eq!(left, ["mine", "out"]);
    assert!(dir.mounts().is_empty() && fs::read(dir.scratch("mine")).unwrap() == vec![7; 1 << 20]);

    let same = dir.run("bench compare out out/report.json --fail-on 10%");
    assert!(same.contains("the same within the noise"), "{same}");
    halve(&dir, "out/report.json", "worse.json");
    let worse = dir.try_run("bench compare out worse.json --fail-on 10%");
    assert_eq!(worse.status.code(), Some(1), "{}{}", worse.text(), worse.stderr);
    assert!(worse.text().contains("WORSE") && dir.try_run("bench compare out worse.json").status.success());
}

/// The report in `from`, in which every figure of a volume's requests is half of what it was.
fn halve(dir: &Node, from: &str, to: &str) {
    let mut report: Value = serde_json::from_slice(&fs::read(dir.scratch(from)).unwrap()).unwrap();
    for lane in report["lanes"].as_array_mut().unwrap() {
        if lane["target"] == "fuse-classic" && lane["workload"] == "rr4k-q32" {
            for place in ["/figures/iops", "/ratios/bare/iops"] {
                let figure = lane.pointer_mut(place).and_then(Value::as_object_mut).unwrap();
                for value in figure.values_mut().filter(|value| value.is_number()) {
                    *value = (value.as_f64().unwrap() / 2.0).into();
                }
            }
        }
    }
    fs::write(dir.scratch(to), report.to_string()).unwrap();
}

#[test]
fn a_run_that_is_interrupted_ends_in_order() {
    let dir = Node::idle();
    let mut command =
        dir.command(&format!("{RUN} --workload rr4k-q1,rr4k-q8 --only bare,fuse-classic --out out"));
    let mut bench = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("a node is mounted", || !dir.mounts().is_empty());
    kill(Pid::from_raw(i32::try_from(bench.id()).unwrap()), Signal::SIGINT).unwrap();
    let mut status = None;
    until("the run ends", || {
        status = bench.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(1));
    assert!(dir.mounts().is_empty());
    let left = fs::read_dir(dir.path("scratch")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| name == "out"));
}

#[test]
fn a_run_that_makes_no_sense_or_has_no_room_is_refused_before_anything_is_made() {
    let dir = Node::idle();
    let refused = dir.refused(&format!("{RUN} --only bear"), 2);
    assert!(refused.contains("there are bare, "), "{refused}");
    dir.refused("bench run --target /no/such/device", 2);
    let refused = dir.refused("bench run disk --only bare --size 4E --dir . --memory-dir .", 1);
    assert!(refused.contains("left, and this run takes up to"), "{refused}");
    let refused = dir.refused("bench compare no-run no-run", 1);
    assert!(refused.contains("no-run"), "{refused}");
    assert_eq!(fs::read_dir(dir.path("scratch")).unwrap().count(), 0);
}

#[test]
fn without_fio_it_says_what_to_install() {
    let dir = Node::idle();
    let mut command = dir.command("bench run --quick");
    let ended = run(command.env("PATH", "/nonexistent"));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("fio is not installed") && ended.stderr.contains("apt-get install fio"));
}
