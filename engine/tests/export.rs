//! What is exported as qcow2, judged by `qemu-img`: `check` finds nothing, `compare` no difference, and holes stay.

#![allow(clippy::unwrap_used, reason = "tests end where something is not as it should be")]

use std::{
    fs,
    fs::File,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::Path,
    process::Command,
};

use bedplate_engine::{
    device::{Access, BlockDevice, Complete, Extent, ExtentKind, Geometry, Request},
    error::{Error, Result},
    export::{
        Content, Existing, Format, Monitor,
        qcow2::{ClusterSize, Compression, Options},
        to_file,
    },
    units::{ByteLen, ByteRange},
};

/// A device over bytes; runs of zeros are told in units of 4 KiB.
struct Bytes(Vec<u8>);

impl BlockDevice for Bytes {
    fn geometry(&self) -> Geometry {
        Geometry { size: ByteLen(self.0.len() as u64), access: Access::ReadOnly }
    }

    fn submit(&self, _request: Request, _complete: Complete) {
        unreachable!("an export reads with read_at");
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let at = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.start.0;
        while at < range.end().0 {
            let end = ((at / 4096 + 1) * 4096).min(range.end().0);
            let block = &self.0[usize::try_from(at).unwrap()..usize::try_from(end).unwrap()];
            let kind = if block.iter().all(|b| *b == 0) { ExtentKind::Zero } else { ExtentKind::Data };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.range.len.0 += end - at,
                _ => extents.push(Extent { range: ByteRange::new(at, end - at), kind }),
            }
            at = end;
        }
        Ok(extents)
    }
}

/// Joins the content that it is shown.
#[derive(Default)]
struct Witness {
    content: Vec<u8>,
    reached: u64,
}

impl Monitor for Witness {
    fn reached(&mut self, at: u64) -> Result<()> {
        assert!(at > self.reached);
        self.reached = at;
        Ok(())
    }

    fn content(&mut self, part: Content<'_>) -> Result<()> {
        match part {
            Content::Data(bytes) => self.content.extend(bytes),
            Content::Zeros(len) => self.content.resize(self.content.len() + usize::try_from(len).unwrap(), 0),
        }
        Ok(())
    }
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Runs of noise, of text, of one byte and of nothing, of all lengths.
fn mixed(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut content = vec![0; len];
    let mut at = 0;
    while at < len {
        let run = usize::try_from(random(&mut state)).unwrap() % 300_000 + 1;
        let end = (at + run).min(len);
        let part = &mut content[at..end];
        match random(&mut state) % 4 {
            0 => part.iter_mut().for_each(|b| *b = random(&mut state).to_le_bytes()[0]),
            1 => {
                part.iter_mut().enumerate().for_each(|(n, b)| *b = b"a line of some log, repeated\n"[n % 29])
            }
            2 => part.fill(random(&mut state).to_le_bytes()[0]),
            _ => {}
        }
        at = end;
    }
    content
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// Export `content`, have it judged, and return the bytes that the file takes.
fn export(dir: &Path, content: &[u8], options: Options) -> u64 {
    let (raw, path) = (dir.join("raw"), dir.join("qcow2"));
    let raw_file = File::create(&raw).unwrap();
    raw_file.set_len(content.len() as u64).unwrap();
    raw_file.write_all_at(content, 0).unwrap();
    let mut witness = Witness::default();
    to_file(&Bytes(content.to_vec()), &path, Existing::Replace, Format::Qcow2(options), &mut witness)
        .unwrap();
    assert!(witness.content == content, "{options:?}: the content that was shown is another");
    let (raw, path) = (raw.to_str().unwrap(), path.to_str().unwrap());
    let checked = run("qemu-img", &["check", "-f", "qcow2", path]);
    assert!(checked.contains("No errors were found"), "{options:?}: {checked}");
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw, path]);
    let info = run("qemu-img", &["info", "--output=json", "-f", "qcow2", path]);
    assert!(info.contains(&format!("\"virtual-size\": {},", content.len())), "{info}");
    fs::metadata(path).unwrap().len()
}

fn options(cluster: u64, compression: Option<Compression>) -> Options {
    Options { cluster: ClusterSize::new(cluster).unwrap(), compression }
}

const COMPRESSIONS: [Option<Compression>; 3] = [None, Some(Compression::Zlib), Some(Compression::Zstd)];

#[test]
fn every_cluster_size_and_compression_is_clean_and_identical() {
    let dir = tempfile::tempdir().unwrap();
    let content = mixed((9 << 20) + 512, 1);
    for bits in 9..=21 {
        for compression in COMPRESSIONS {
            export(dir.path(), &content, options(1 << bits, compression));
        }
    }
}

#[test]
fn sizes_around_the_edges_of_clusters_tables_and_pieces_are_identical() {
    let dir = tempfile::tempdir().unwrap();
    for len in [0, 512, 4096 - 512, 4096, 4096 + 512, (2 << 20) - 512, 2 << 20, (2 << 20) + 512] {
        for fill in [0, 7] {
            for compression in COMPRESSIONS {
                export(dir.path(), &vec![fill; len], options(4096, compression));
            }
        }
    }
}

#[test]
fn random_contents_are_identical() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 2..22 {
        let mut state = seed;
        let len = usize::try_from(random(&mut state)).unwrap() % (6 << 20) / 512 * 512;
        let content = mixed(len, seed);
        let bits = 9 + random(&mut state) % 13;
        export(dir.path(), &content, options(1 << bits, COMPRESSIONS[usize::try_from(seed).unwrap() % 3]));
    }
}

#[test]
fn tiny_compressed_clusters_share_clusters_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let content = vec![7; 64 << 20];
    let len = export(dir.path(), &content, options(64 << 10, Some(Compression::Zstd)));
    // The header, the data, a table, the list of tables, counts and their list.
    assert_eq!(len, 6 * (64 << 10));
}

#[test]
fn holes_and_clusters_of_zeros_take_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let mut content = vec![0; 64 << 20];
    content[10 << 20..11 << 20].fill(7);
    let len = export(dir.path(), &content, Options::default());
    // The data, the header, one table of mappings, the list of tables, counts and their list.
    assert_eq!(len, (1 << 20) + 5 * (64 << 10));
}

#[test]
fn what_the_cluster_size_cannot_address_is_refused_and_leaves_no_file() {
    struct Huge;
    impl BlockDevice for Huge {
        fn geometry(&self) -> Geometry {
            Geometry { size: ByteLen(64 << 40), access: Access::ReadOnly }
        }
        fn submit(&self, _request: Request, _complete: Complete) {
            unreachable!("refused");
        }
        fn extents(&self, _range: ByteRange) -> Result<Vec<Extent>> {
            unreachable!("refused");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, format) = (dir.path().join("x"), Format::Qcow2(options(512, None)));
    let refused = to_file(&Huge, &path, Existing::Refuse, format, &mut Witness::default());
    assert!(matches!(refused, Err(Error::Invalid(text)) if text.contains("larger clusters")));
    assert!(!path.exists());
    for bytes in [0, 256, 513, 4 << 20] {
        assert!(matches!(ClusterSize::new(bytes), Err(Error::Invalid(_))));
    }
}

#[test]
fn a_failure_in_the_middle_ends_every_thread_and_leaves_no_image() {
    struct Broken(Bytes);
    impl BlockDevice for Broken {
        fn geometry(&self) -> Geometry {
            self.0.geometry()
        }
        fn submit(&self, _request: Request, _complete: Complete) {
            unreachable!("an export reads with read_at");
        }
        fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
            self.0.extents(range)
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
            let bad = offset >= 5 << 20;
            if bad { Err(Error::Closed) } else { self.0.read_at(buffer, offset) }
        }
    }
    let device = Broken(Bytes(vec![7; 16 << 20]));
    let dir = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2(Options::default())] {
        let path = dir.path().join("x");
        let failed = to_file(&device, &path, Existing::Refuse, format, &mut Witness::default());
        assert!(matches!(failed, Err(Error::Closed)));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_monitor_ends_an_export_with_its_own_error() {
    struct Impatient;
    impl Monitor for Impatient {
        fn reached(&mut self, at: u64) -> Result<()> {
            if at > 3 << 20 { Err(Error::Invalid("enough".into())) } else { Ok(()) }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let ended = to_file(&Bytes(vec![7; 16 << 20]), &path, Existing::Refuse, Format::Raw, &mut Impatient);
    assert!(matches!(ended, Err(Error::Invalid(text)) if text == "enough"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_monitor_reads_the_whole_file_before_it_has_its_name_and_may_refuse_it() {
    struct Reader(Option<Vec<u8>>);
    impl Monitor for Reader {
        fn reached(&mut self, _at: u64) -> Result<()> {
            Ok(())
        }
        fn complete(&mut self, file: &File) -> Result<()> {
            let mut start = vec![0; 4];
            file.read_exact_at(&mut start, 0).unwrap();
            self.0 = Some(start);
            Err(Error::Invalid("not this one".into()))
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, format) = (dir.path().join("x"), Format::Qcow2(Options::default()));
    let mut reader = Reader(None);
    let refused = to_file(&Bytes(vec![7; 1 << 20]), &path, Existing::Refuse, format, &mut reader);
    assert!(matches!(refused, Err(Error::Invalid(text)) if text == "not this one"));
    assert_eq!(reader.0.as_deref(), Some(&b"QFI\xfb"[..]));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn only_regular_files_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (pipe, link) = (dir.path().join("pipe"), dir.path().join("link"));
    run("mkfifo", &[pipe.to_str().unwrap()]);
    std::os::unix::fs::symlink(&pipe, &link).unwrap();
    let device = Bytes(vec![7; 4096]);
    for path in [&pipe, &link, dir.path()] {
        let refused = to_file(&device, path, Existing::Replace, Format::Raw, &mut Witness::default());
        assert!(matches!(refused, Err(Error::Invalid(text)) if text.contains("not a regular file")));
    }
    assert!(fs::metadata(&link).unwrap().file_type().is_fifo());
    fs::remove_file(&pipe).unwrap();
    // A link that leads nowhere is replaced.
    to_file(&device, &link, Existing::Replace, Format::Raw, &mut Witness::default()).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_file());
}

#[test]
fn a_raw_export_has_the_same_bytes_and_its_zeros_are_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    for (len, seed) in [(0, 0), (512, 0), ((9 << 20) + 512, 3)] {
        let content = mixed(len, seed);
        let mut witness = Witness::default();
        let device = Bytes(content.clone());
        to_file(&device, &path, Existing::Replace, Format::Raw, &mut witness).unwrap();
        assert!(fs::read(&path).unwrap() == content && witness.content == content);
        let blocks = content.chunks(4096).filter(|block| block.iter().any(|b| *b != 0)).count();
        let taken = usize::try_from(fs::metadata(&path).unwrap().blocks()).unwrap();
        // The file system may need some for itself.
        assert!(taken <= blocks * 8 + 64, "{taken} sectors for {blocks} blocks");
    }
    let taken = to_file(&Bytes(Vec::new()), &path, Existing::Refuse, Format::Raw, &mut Witness::default());
    assert!(matches!(taken, Err(Error::Exists { .. })));
}
