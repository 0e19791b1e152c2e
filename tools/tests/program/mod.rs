//! Running the program and its judges.

#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part")]

use std::process::Command;

use serde_json::Value;

/// How a program ended.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub bytes: Vec<u8>,
    pub stderr: String,
}

impl Outcome {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

pub fn run(program: &str, args: &[&str]) -> Outcome {
    let output = Command::new(program).args(args).output().unwrap();
    Outcome {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        bytes: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

pub fn inspect(args: &[&str]) -> Outcome {
    run(env!("CARGO_BIN_EXE_bedplate-inspect"), args)
}

pub fn qemu_img(args: &[&str]) -> Outcome {
    run("qemu-img", args)
}

/// Commands, separated by semicolons, on an image; it may have options before it.
pub fn qemu_io(image: &str, commands: &str) {
    let mut args: Vec<&str> = Vec::new();
    for command in commands.split(';') {
        args.extend(["-c", command.trim()]);
    }
    args.extend(image.split(' '));
    let done = run("qemu-io", &args);
    assert_eq!(done.code, 0, "{done:?}");
}
