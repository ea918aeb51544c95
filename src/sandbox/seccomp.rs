//! System call filters: one for each role, made of the lists in [`calls`](super::calls).

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use super::calls;
use super::{Failure, Notice, Role, SystemCalls};

const LAYER: &str = "seccomp";

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The filters of all roles, ready to be put on.
pub struct Filters(Vec<(Role, BpfProgram)>);

impl Filters {
    /// Makes all filters, and puts on the one for the whole process.
    pub fn install(action: SystemCalls, notices: &mut Vec<Notice>) -> Result<Option<Self>, Failure> {
        let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(failed)?;
        let violation = match action {
            SystemCalls::Kill => SeccompAction::KillProcess,
            SystemCalls::Trap => SeccompAction::Trap,
            SystemCalls::Log => SeccompAction::Log,
            SystemCalls::None => return Ok(None),
        };
        if let Err(error) = apply_filter(&of_process(arch)?) {
            notices.push(Notice::Missing(format!("no system call filter: {error}")));
            return Ok(None);
        }
        let own = std::process::id();
        let filters = Role::ALL.map(|role| Ok((role, of_role(role, own, &violation, arch)?)));
        Ok(Some(Self(filters.into_iter().collect::<Result<_, Failure>>()?)))
    }

    /// Puts on the filter of `role`.
    pub fn enter(&self, role: Role) -> Result<(), Failure> {
        let filter = self.0.iter().find(|(of, _)| *of == role);
        let (_, filter) = filter.ok_or_else(|| failed("there is no filter for this thread"))?;
        apply_filter(filter).map_err(failed)
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::new(LAYER, error)
}

/// Has `clone3` fail as it does on hosts that do not know it. Its flags are in memory, where a filter cannot look, and
/// C libraries fall back to `clone`.
fn of_process(arch: TargetArch) -> Result<BpfProgram, Failure> {
    let rules = Rules::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    compile(SeccompFilter::new(rules, SeccompAction::Allow, unknown, arch))
}

fn of_role(role: Role, own: u32, violation: &SeccompAction, arch: TargetArch) -> Result<BpfProgram, Failure> {
    let mut rules = Rules::new();
    let lists = calls::lists(role);
    for call in lists.iter().flat_map(|list| list.numbers()) {
        rules.insert(call, Vec::new());
    }
    let makes = |call: c_long| {
        lists
            .iter()
            .any(|list| list.numbers().any(|number| number == call))
    };
    let mut only = |call: c_long, alternatives: Vec<SeccompCondition>| -> Result<(), Failure> {
        let alternatives = alternatives.into_iter().map(|one| SeccompRule::new(vec![one]));
        rules.insert(call, alternatives.collect::<Result<_, _>>().map_err(failed)?);
        Ok(())
    };
    if !calls::loads_libraries(role) {
        let not_executable = || bits(2, libc::PROT_EXEC, 0);
        only(libc::SYS_mmap, vec![not_executable()?])?;
        only(libc::SYS_mprotect, vec![not_executable()?])?;
    }
    only(libc::SYS_tgkill, vec![equal(0, u64::from(own))?])?;
    let controls = [
        libc::PR_SET_NAME,
        libc::PR_GET_NAME,
        libc::PR_SET_NO_NEW_PRIVS,
        libc::PR_GET_NO_NEW_PRIVS,
        libc::PR_GET_DUMPABLE,
        PR_GET_AUXV,
        libc::PR_GET_SECCOMP,
        libc::PR_GET_TIMERSLACK,
        libc::PR_CAPBSET_READ,
        libc::PR_SET_VMA,
    ];
    only(libc::SYS_prctl, alternatives(0, controls)?)?;
    // Looking at limits, of the process itself.
    only(libc::SYS_prlimit64, vec![long(2, 0)?])?;
    if makes(libc::SYS_clone3) {
        only(
            libc::SYS_clone,
            vec![bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?],
        )?;
    }
    if makes(libc::SYS_clone3) && makes(libc::SYS_setresuid) {
        only(libc::SYS_unshare, vec![equal_int(0, libc::CLONE_FS)?])?;
    }
    if makes(libc::SYS_connect) {
        let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
        only(libc::SYS_socket, alternatives(0, families)?)?;
    } else if makes(libc::SYS_syncfs) && !makes(libc::SYS_sendmsg) {
        // Flags, projects and space of files, nothing of devices.
        only(libc::SYS_ioctl, file_ioctls()?)?;
    }
    if calls::loads_libraries(role) {
        rules.insert(libc::SYS_mmap, Vec::new());
        rules.insert(libc::SYS_mprotect, Vec::new());
    }
    compile(SeccompFilter::new(
        rules,
        violation.clone(),
        SeccompAction::Allow,
        arch,
    ))
}

fn compile(filter: Result<SeccompFilter, seccompiler::BackendError>) -> Result<BpfProgram, Failure> {
    filter.and_then(TryInto::try_into).map_err(failed)
}

fn condition(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, Failure> {
    SeccompCondition::new(argument, length, operator, value).map_err(failed)
}

/// A 64-bit argument is `value`.
fn long(argument: u8, value: u64) -> Result<SeccompCondition, Failure> {
    condition(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value)
}

/// A 32-bit argument is `value`.
fn equal(argument: u8, value: u64) -> Result<SeccompCondition, Failure> {
    condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn equal_int(argument: u8, value: i32) -> Result<SeccompCondition, Failure> {
    equal(argument, u64::from(value.cast_unsigned()))
}

/// The bits `mask` of an argument are `value`.
fn bits(argument: u8, mask: i32, value: i32) -> Result<SeccompCondition, Failure> {
    let mask = SeccompCmpOp::MaskedEq(u64::from(mask.cast_unsigned()));
    condition(
        argument,
        SeccompCmpArgLen::Qword,
        mask,
        u64::from(value.cast_unsigned()),
    )
}

fn alternatives<const N: usize>(argument: u8, values: [i32; N]) -> Result<Vec<SeccompCondition>, Failure> {
    values
        .into_iter()
        .map(|value| equal_int(argument, value))
        .collect()
}

/// The ioctls of requests: those of `chattr`, for which there is a number of each word size, and where a file has space.
fn file_ioctls() -> Result<Vec<SeccompCondition>, Failure> {
    let numbers: [u64; 7] = [
        libc::FS_IOC_GETFLAGS,
        libc::FS_IOC_SETFLAGS,
        libc::FS_IOC32_GETFLAGS,
        libc::FS_IOC32_SETFLAGS,
        FS_IOC_FSGETXATTR,
        FS_IOC_FSSETXATTR,
        FS_IOC_FIEMAP,
    ]
    .map(|number| number & u64::from(u32::MAX));
    numbers.into_iter().map(|number| equal(1, number)).collect()
}

/// Looking at what the kernel told the program about itself.
const PR_GET_AUXV: i32 = 0x4155_5856;

/// `_IOR('X', 31, struct fsxattr)`, of 28 bytes.
const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: u64 = 0xc020_660b;
/// `_IOW('X', 32, struct fsxattr)`.
const FS_IOC_FSSETXATTR: u64 = 0x401c_5820;
