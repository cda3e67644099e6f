import CLinux
import DiskImage
import Foundation
import Testing

@testable import ImageStorage

@Suite struct TargetFileTests {
    let folder: Folder

    init() throws { folder = try Folder() }

    private func write(_ text: String, to target: TargetFile) async throws {
        let bytes = Array(text.utf8)
        let span = bytes.span.bytes
        try await target.storage.write(span, at: 0)
    }

    @Test(arguments: CacheMode.allCases)
    func appearsAtCommit(mode: CacheMode) async throws {
        let path = try folder.file("new")
        let target = try TargetFile.create(HostPath(path), cacheMode: mode)
        try await write("whole", to: target)
        #expect(try !folder.names.contains("new"))
        try await target.commit()
        #expect(try folder.names == ["new"])
        #expect(try contents(path) == Array("whole".utf8))
    }

    @Test func leavesNothingBehind() async throws {
        let old = try folder.file("old", Array("old".utf8))
        for path in [try folder.file("new"), old] {
            let target = try TargetFile.create(HostPath(path), cacheMode: .unsafe)
            try await write("half", to: target)
            target.abandon()
        }
        #expect(try folder.names == ["old"])
        #expect(try contents(old) == Array("old".utf8))
    }

    @Test func forgottenTargetsGoToo() async throws {
        do {
            let target = try TargetFile.create(HostPath(folder.file("new")), cacheMode: .unsafe)
            try await write("half", to: target)
        }
        #expect(try folder.names.isEmpty)
    }

    @Test func keepsModeAndAttributes() async throws {
        let path = try folder.file("disk", Array("old".utf8))
        #expect(chmod(path, 0o604) == 0)
        let hasAttributes = setxattr(path, "user.note", "kept", 4, 0) == 0
        let target = try TargetFile.create(HostPath(path), cacheMode: .unsafe)
        #expect(target.isStaged)
        try await write("new", to: target)
        #expect(try contents(path) == Array("old".utf8))
        try await target.commit()
        #expect(try contents(path) == Array("new".utf8))
        var status = stat()
        #expect(stat(path, &status) == 0 && status.st_mode & 0o7777 == 0o604)
        if hasAttributes {
            var value = [UInt8](repeating: 0, count: 4)
            #expect(getxattr(path, "user.note", &value, 4) == 4)
            #expect(value == Array("kept".utf8))
        }
        #expect(try folder.names == ["disk"])
    }

    @Test func symbolicLinksStay() async throws {
        let file = try folder.file("file", [])
        let link = try folder.file("link")
        let dangling = try folder.file("dangling")
        #expect(symlink("file", link) == 0 && symlink("made", dangling) == 0)
        for (path, place) in [(link, file), (dangling, try folder.file("made"))] {
            let target = try TargetFile.create(HostPath(path), cacheMode: .unsafe)
            try await write("new", to: target)
            try await target.commit()
            var status = stat()
            #expect(lstat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFLNK)
            #expect(try contents(place) == Array("new".utf8))
        }
        #expect(symlink("loop", try folder.file("loop")) == 0)
        #expect(throws: ImageError.self) {
            try TargetFile.create(HostPath(folder.file("loop")), cacheMode: .unsafe)
        }
    }

    @Test func hardLinksAreWrittenInPlace() async throws {
        let path = try folder.file("one", Array("something long".utf8))
        let other = try folder.file("two")
        #expect(link(path, other) == 0)
        do {
            let target = try TargetFile.create(HostPath(path), cacheMode: .unsafe)
            #expect(!target.isStaged)
            // Nothing else may open it meanwhile, by either name.
            #expect(throws: ImageError.self) {
                try FileStorage.openExistingTarget(HostPath(other), cacheMode: .unsafe)
            }
            try await write("new", to: target)
            try await target.commit()
        }
        #expect(try contents(other) == Array("new".utf8))
        // An abandoned target is empty, so that it does not look finished.
        let second = try TargetFile.create(HostPath(path), cacheMode: .unsafe)
        try await write("half", to: second)
        second.abandon()
        #expect(try contents(other).isEmpty)
    }

    @Test func existingTargetsAreNotEmptied() async throws {
        let path = try folder.file("disk", Array("0123456789".utf8))
        let target = try TargetFile.openExisting(HostPath(path), cacheMode: .unsafe)
        #expect(!target.storage.traits.readsAsZero)
        try await write("ab", to: target)
        try await target.commit()
        #expect(try contents(path) == Array("ab23456789".utf8))
        target.abandon()
        #expect(try contents(path) == Array("ab23456789".utf8))
        #expect(throws: ImageError.self) {
            try TargetFile.openExisting(HostPath(folder.file("none")), cacheMode: .unsafe)
        }
    }

    @Test func protectsSources() throws {
        let path = try folder.file("disk", [1])
        let source = try FileStorage.openSource(HostPath(path))
        for make in [
            {
                try TargetFile.create(
                    HostPath(path), cacheMode: .unsafe, protecting: [source.identity])
            },
            {
                try TargetFile.openExisting(
                    HostPath(path), cacheMode: .unsafe, protecting: [source.identity])
            },
        ] {
            let error = #expect(throws: ImageError.self) { _ = try make() }
            #expect(error?.kind == .invalid)
        }
        #expect(try contents(path) == [1])
    }

    @Test func someoneElsesFileIsReplacedWhole() async throws {
        // Another process makes the file while ours is being written.
        let path = try folder.file("disk")
        let target = try TargetFile.create(HostPath(path), cacheMode: .unsafe)
        try await write("ours", to: target)
        _ = try folder.file("disk", Array("theirs".utf8))
        try await target.commit()
        #expect(try contents(path) == Array("ours".utf8))
        #expect(try folder.names == ["disk"])
    }
}
