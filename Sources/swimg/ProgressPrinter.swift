import Glibc
import Synchronization

/// Shows a command's progress: as a bar on a terminal, in qemu-img's form otherwise.
final class ProgressPrinter: Sendable {
    private struct State {
        var done: Int64 = 0
        var total: Int64 = 0
        var printedHundredths = -1
        var printedAt: ContinuousClock.Instant?
    }

    private let isShown: Bool
    private let isTerminal = isatty(STDOUT_FILENO) == 1
    private let start = ContinuousClock().now
    private let state = Mutex(State())

    /// - Parameter isShown: if false, only `printStatus` prints.
    init(isShown: Bool) { self.isShown = isShown }

    func update(done: Int64, total: Int64) {
        state.withLock {
            $0.done = done
            $0.total = total
            guard isShown else { return }
            let hundredths = Self.hundredths(done, total)
            if isTerminal {
                let now = ContinuousClock().now
                if let last = $0.printedAt, now - last < .milliseconds(100), done < total { return }
                $0.printedAt = now
                Output.show("\r" + bar(done, total, now - start))
            } else if $0.printedHundredths < 0 || hundredths - $0.printedHundredths >= 100
                || done == total && hundredths != $0.printedHundredths
            {
                // qemu-img prints in steps of one percent.
                if $0.printedHundredths < 0, hundredths > 0 { Output.show(Self.qemuForm(0)) }
                Output.show(Self.qemuForm(hundredths))
                $0.printedHundredths = hundredths
            }
        }
    }

    /// Completes the display after a command that succeeded.
    func finish() {
        guard isShown else { return }
        state.withLock {
            if isTerminal {
                Output.show("\r" + bar($0.total, $0.total, ContinuousClock().now - start) + "\n")
            } else {
                if $0.printedHundredths < 0 { Output.show(Self.qemuForm(0)) }
                Output.show(Self.qemuForm(100_00) + "\n")
            }
        }
    }

    /// Completes the display after a comparison. Without a terminal, the verdict follows the last
    /// progress and an empty line follows the verdict, as in qemu-img.
    func finish(isWhole: Bool, with verdict: String) {
        guard isShown, !isTerminal else {
            if isWhole { finish() } else { giveUp() }
            return Output.print(verdict)
        }
        state.withLock {
            if $0.printedHundredths < 0 { Output.show(Self.qemuForm(0)) }
            if isWhole, $0.printedHundredths < 100_00 { Output.show(Self.qemuForm(100_00)) }
        }
        Output.print(verdict + "\n")
    }

    /// Ends the line of the bar after a failure, so that the error message starts on a new line.
    func giveUp() {
        let isBarShown = state.withLock { $0.printedAt != nil }
        if isBarShown { Output.show("\n") }
    }

    /// Prints one line to standard error, for SIGUSR1, unless progress is shown anyway.
    func printStatus() {
        guard !isShown else { return }
        let (done, total) = state.withLock { ($0.done, $0.total) }
        Output.printError("    (\(Self.percent(Self.hundredths(done, total)))/100%)\n")
    }

    private static func qemuForm(_ hundredths: Int) -> String {
        "    (\(percent(hundredths))/100%)\r"
    }

    /// Progress in hundredths of a percent; an empty disk is complete.
    private static func hundredths(_ done: Int64, _ total: Int64) -> Int {
        total > 0 ? Int(Double(done) / Double(total) * 100_00) : 100_00
    }

    private static func percent(_ hundredths: Int) -> String {
        let rest = hundredths % 100
        return "\(hundredths / 100).\(rest < 10 ? "0" : "")\(rest)"
    }

    private func bar(_ done: Int64, _ total: Int64, _ elapsed: Duration) -> String {
        let hundredths = Self.hundredths(done, total)
        let width = 30
        let filled = hundredths * width / 100_00
        let seconds = elapsed / .seconds(1)
        let rate = seconds > 0 ? Double(done) / seconds : 0
        // The rate after the first bytes of a large disk is unreliable, and the estimate may exceed
        // the range of Int.
        let left = rate > 0 ? Int(min(Double(total - done) / rate, 1e15)) : 0
        let line =
            "[" + String(repeating: "#", count: filled)
            + String(repeating: " ", count: width - filled)
            + "] \(Self.percent(hundredths)) %  \(Self.readable(rate))/s  "
            + (done < total ? "\(Self.clock(left)) left" : "in \(Self.clock(Int(seconds)))")
        // Trailing spaces erase the rest of a longer previous line.
        return line + String(repeating: " ", count: max(0, 78 - line.count))
    }

    private static func readable(_ bytes: Double) -> String {
        var number = bytes
        for unit in ["B", "KiB", "MiB", "GiB"] {
            if number < 1024 { return "\(Int(number)) \(unit)" }
            number /= 1024
        }
        return "\(Int(number)) TiB"
    }

    private static func clock(_ seconds: Int) -> String {
        let rest = seconds % 60
        return seconds >= 3600
            ? "\(seconds / 3600) h \(seconds / 60 % 60) min"
            : "\(seconds / 60):\(rest < 10 ? "0" : "")\(rest)"
    }
}
